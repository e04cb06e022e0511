"""What `config.json` says of the text model, as transformers reads it: defaults of the model's class filled in, older
fields renamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.export.gguf_architectures.rope import Rope, read_rope
from whet.export.json_files import read_json

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes in elements, `context` and `window` in tokens.

    architecture: the class in transformers. rope: of the layers with full attention. local_rope: of those with a
    sliding window, where the family keeps two. window: of the layers that slide; None where none does. layer_types:
    a word for each layer; empty where all are alike. tied: the token embedding is also the output matrix.
    raw: every field of the config. where: its path, for errors.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocab: int
    rms_eps: float
    rope: Rope
    local_rope: Rope | None
    window: int | None
    layer_types: tuple[str, ...]
    tied: bool
    raw: dict[str, Any]
    where: str


def read_config(model_dir: Path) -> ModelConfig:
    """Read `model_dir/config.json`. Raises WhetError where it is missing, broken, or lacks a field."""
    path = Path(model_dir) / "config.json"
    raw, where = _raw(path), str(path)
    try:
        return _config(raw, where)
    except KeyError as error:
        raise WhetError(
            f"the field {error} is missing from the config of {raw['architectures'][0]}",
            where=where,
            fix="save the model again",
        ) from None


def architecture_name(model_dir: Path) -> str | None:
    """The one class that `config.json` names; None where it names none or several."""
    named = read_json(Path(model_dir) / "config.json").get("architectures") or []
    return str(named[0]) if len(named) == 1 else None


def _raw(path: Path) -> dict[str, Any]:
    if read_json(path).get("quantization_config"):
        raise WhetError(
            "the checkpoint is quantized, and GGUF is made from 16- or 32-bit weights",
            where=str(path),
            fix='save it with save_method="merged_16bit" first',
        )
    from transformers import AutoConfig  # slow to import, and only needed here

    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers' validators raise of every kind
        raise WhetError(f"transformers refuses the config: {error}", where=str(path), fix="save it again") from error
    raw: dict[str, Any] = config.get_text_config().to_dict()
    return raw | {"architectures": config.architectures}


def _config(raw: dict[str, Any], where: str) -> ModelConfig:
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or hidden // heads
    rope = raw["rope_parameters"]
    return ModelConfig(
        architecture=raw["architectures"][0],
        layers=raw["num_hidden_layers"],
        hidden=hidden,
        intermediate=raw["intermediate_size"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        context=raw["max_position_embeddings"],
        vocab=raw["vocab_size"],
        rms_eps=raw["rms_norm_eps"],
        rope=read_rope(rope.get(FULL, rope), head_dim, where),
        local_rope=read_rope(rope[SLIDING], head_dim, where) if SLIDING in rope else None,
        window=raw.get("sliding_window") or None,
        layer_types=tuple(raw.get("layer_types") or ()),
        tied=bool(raw["tie_word_embeddings"]),
        raw=raw,
        where=where,
    )
