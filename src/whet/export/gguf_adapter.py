"""A PEFT LoRA adapter -> a GGUF adapter, which llama.cpp and Ollama put on a base at run time.

    y = W x + adapter_scale * (alpha / r) * B (A x),    A [r, in], B [out, r]

llama.cpp keeps one alpha a file and takes r from B. Adapters whose layers have scales of their own (patterns of rank or
alpha, rsLoRA) have theirs multiplied into B. Rows of B change places as the base's rows do. An embedding's A is stored
transposed, [vocabulary, r], since it is looked up by row.
What a GGUF adapter cannot hold is refused, never left out: DoRA, biases, modules trained whole, added tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from whet.errors import WhetError
from whet.export.gguf_architectures import Architecture, SourceTensor, architecture_of
from whet.export.json_files import read_json
from whet.export.lora_scale import lora_scale
from whet.export.merge_adapter import check_start
from whet.files import refused_when_full, whole_file
from whet.quant.gguf_types import TYPES, GGUFType

DTYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_MERGE = "merge the adapter (save_pretrained_merged) and export the whole model as GGUF"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
# Fields of adapter_config.json that change what the adapter computes, and what each is.
_NOT_LORA = {
    "use_dora": "DoRA, which rescales the rows of the sum",
    "lora_bias": "biases of its own",
    "modules_to_save": "modules trained whole",
    "trainable_token_indices": "tokens' embeddings trained whole",
    "target_parameters": "LoRA on parameters outside of layers",
    "layer_replication": "layers used several times",
    "alora_invocation_tokens": "an invocation text that switches it on",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "arrow_config": "a router over several adapters",
    "fan_in_fan_out": "transposed layers",
}


@dataclass(frozen=True)
class AdapterReport:
    """What was written. alpha: the file's. rescaled: GGUF tensor -> what its B was multiplied with, where not 1."""

    path: Path
    nbytes: int
    tensors: list[str]
    alpha: float
    rescaled: dict[str, float]


@dataclass(frozen=True)
class _Pair:
    """The halves of a layer's adapter, fp32, as PEFT stores them: a [r, in], b [out, r]. scale: of their product."""

    target: SourceTensor
    a: Tensor
    b: Tensor
    scale: float
    embedding: bool

    @property
    def alpha(self) -> float:
        """The alpha that gives llama.cpp this scale: it divides by r."""
        return self.scale * self.a.shape[0]


def write_gguf_adapter(adapter_dir: Path, model_dir: Path, out: Path, *, dtype: str = "f32") -> AdapterReport:
    """Convert the PEFT adapter in `adapter_dir`, for the base whose config.json is in `model_dir`, to the file `out`.

    dtype: f32, f16, bf16 or q8_0. Raises WhetError for what a GGUF adapter cannot hold, and for an adapter that does
    not fit the base; nothing is then written.
    """
    adapter_dir, out = Path(adapter_dir), Path(out)
    if dtype not in DTYPES:
        raise WhetError(f"unknown dtype {dtype!r}", where="dtype", fix=f"choose one of {', '.join(DTYPES)}")
    architecture = architecture_of(model_dir)
    pairs = _read_pairs(adapter_dir, architecture)
    alpha = pairs[0].alpha
    rescaled = {pair.target.name: pair.alpha / alpha for pair in pairs if pair.alpha != alpha}
    out.parent.mkdir(parents=True, exist_ok=True)
    with refused_when_full(out), whole_file(out) as partial:
        writer = gguf.GGUFWriter(partial, architecture.gguf_name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter_dir.absolute().name)
        writer.add_file_type(DTYPES[dtype])
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for pair in pairs:
            for side, x in _halves(pair, rescaled.get(pair.target.name, 1.0)):
                _add(writer, f"{pair.target.name}.lora_{side}", x, TYPES[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return AdapterReport(out, out.stat().st_size, [pair.target.name for pair in pairs], alpha, rescaled)


def _halves(pair: _Pair, factor: float) -> Iterator[tuple[str, NDArray[np.float32]]]:
    a = pair.a.T if pair.embedding else pair.a
    b = pair.target.convert(pair.b.numpy()) if not pair.embedding else pair.b.numpy()
    yield "a", np.ascontiguousarray(a.numpy())
    yield "b", np.ascontiguousarray(b * np.float32(factor) if factor != 1 else b)


def _add(writer: gguf.GGUFWriter, name: str, x: NDArray[np.float32], kind: GGUFType) -> None:
    if x.shape[1] % kind.block_size:
        kind = TYPES["f32"]  # B's rows are r long, mostly fewer than a block
    try:
        writer.add_tensor(name, kind.encode(x), raw_dtype=kind.ggml)
    except WhetError as error:
        raise WhetError(error.what, where=name, fix='dtype="f32"') from error


def _read_pairs(folder: Path, architecture: Architecture) -> list[_Pair]:
    """The adapter's pairs in the order of the model's tensors."""
    config = _read_config(folder)
    weights = _read_weights(folder)
    targets = {tensor.source.removesuffix(".weight"): tensor for tensor in architecture.expected_tensors()}
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, value in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise WhetError(f"the adapter holds {key}, which is no half of a LoRA", where=str(folder), fix=_MERGE)
        halves.setdefault(match["module"], {})[match["side"]] = value.float()
        if match["embedding"]:
            embeddings.add(match["module"])
    pairs = [
        _pair(module, sides, module in embeddings, targets, config, architecture, folder)
        for module, sides in halves.items()
    ]
    order = {tensor.name: place for place, tensor in enumerate(targets.values())}
    return sorted(pairs, key=lambda pair: order[pair.target.name])


def _pair(
    module: str,
    sides: dict[str, Tensor],
    embedding: bool,
    targets: dict[str, SourceTensor],
    config: dict[str, Any],
    architecture: Architecture,
    folder: Path,
) -> _Pair:
    if module not in targets or (embedding and architecture.config.tied):
        tied = architecture.config.tied and (embedding or module == "lm_head")
        lacks = "one matrix for embedding and output" if tied else "no such layer"
        raise WhetError(
            f"the adapter changes {module}, and the model in GGUF has {lacks}", where=str(folder), fix=_MERGE
        )
    if sides.keys() != {"A", "B"}:
        raise WhetError(f"one half of the adapter of {module} is missing", where=str(folder), fix="save it again")
    a, b, target = sides["A"], sides["B"], targets[module]
    found = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], a.shape[1])
    if found != target.shape or a.shape[0] != b.shape[1]:
        raise WhetError(
            f"the adapter of {module} is for a matrix of {list(found)}, and the base's is {list(target.shape)}",
            where=str(folder),
            fix="give the folder of the base that the adapter was trained on",
        )
    scale = lora_scale(config, module, a.shape[0])
    if scale == 0:  # llama.cpp reads an alpha of 0 as none, and scales by 1
        raise WhetError(f"the adapter of {module} has lora_alpha = 0, and changes nothing", where=str(folder))
    return _Pair(target, a, b, scale, embedding)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    fields: dict[str, Any] = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise WhetError(f"the adapter is of type {fields.get('peft_type')}, not LORA", where=str(path), fix=_MERGE)
    held = [what for name, what in _NOT_LORA.items() if fields.get(name)]
    if fields.get("bias", "none") != "none":
        held.append("trained biases")
    if held:
        raise WhetError(
            f"the adapter has {', '.join(held)}: a GGUF adapter holds A and B alone", where=str(path), fix=_MERGE
        )
    check_start(fields, str(path))
    return fields


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    try:
        weights = load_file(path)
    except FileNotFoundError:
        fix = "save the adapter with save_pretrained; pickle files (.bin) are not read"
        raise WhetError("the adapter's weights are missing", where=str(path), fix=fix) from None
    except (SafetensorError, OSError) as error:
        raise WhetError(f"the file cannot be read: {error}", where=str(path), fix="save it again") from error
    if not weights:
        raise WhetError("the adapter holds no weights", where=str(path), fix="save it again")
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise WhetError(f"{name} holds a number that is not finite", where=str(path), fix="train again")
    return weights
