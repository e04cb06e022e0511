"""Do a tokenizer and a model fit together? Asked of their files alone, before anything is merged or converted.

A tokenizer that was changed after training, or a model whose embedding was not resized for it, gives files that load
and answer nonsense. Everything found is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data.fingerprint import NAME, Fingerprint, check, fingerprint
from whet.errors import WhetError, WhetErrors
from whet.export.gguf_tokenizer import load_tokenizer
from whet.export.json_files import read_json
from whet.export.merge_files import places_in

_EMBEDDING = ("embed_tokens.weight", "embed_tokens.modules_to_save.default.weight")
_HEAD = ("lm_head.weight", "lm_head.modules_to_save.default.weight")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """What was found to fit.

    tokens: the tokenizer's highest id and one. rows, head_rows: of the embedding and of the head; equal where they are
    one. added: text -> id of the added tokens. fingerprint: of the tokenizer.
    """

    tokens: int
    rows: int
    head_rows: int
    added: dict[str, int]
    fingerprint: Fingerprint


def check_vocabulary(
    model_dir: Path,
    *,
    tokenizer_dir: Path | None = None,
    adapter_dir: Path | None = None,
    base_dir: Path | None = None,
    fingerprint_dir: Path | None = None,
) -> Vocabulary:
    """Check that the tokenizer fits the model in `model_dir`.

    tokenizer_dir: where the tokenizer is, when not in `model_dir`. adapter_dir: an adapter on the model, which may
    bring an embedding of its own. base_dir: the model that was tuned; its tokens must keep their ids. fingerprint_dir:
    holds the fingerprint that was made with the training data.
    Raises WhetErrors with every fault: sizes, ids beyond the vocabulary, tokens that moved, another fingerprint.
    """
    tokenizer_dir = tokenizer_dir or model_dir
    tokenizer = load_tokenizer(tokenizer_dir)
    sizes = [folder for folder in (adapter_dir, model_dir) if folder]
    rows = _rows(sizes, _EMBEDDING)
    if rows is None:
        raise WhetError("there is no embedding here", where=str(model_dir), fix="give the folder of a whole model")
    found = Vocabulary(
        tokens=max(tokenizer.get_vocab().values()) + 1,
        rows=rows,
        head_rows=_rows(sizes, _HEAD) or rows,
        added={token.content: index for index, token in tokenizer.added_tokens_decoder.items()},
        fingerprint=fingerprint(tokenizer),
    )
    faults = [*_size_faults(found, model_dir, adapter_dir), *_id_faults(found, tokenizer, model_dir)]
    if base_dir:
        faults += _moved(tokenizer, load_tokenizer(base_dir), tokenizer_dir)
    if fingerprint_dir:
        faults += _caught(lambda: _check_fingerprint(tokenizer, fingerprint_dir))
    if faults:
        raise WhetErrors(faults)
    return found


def _size_faults(found: Vocabulary, model_dir: Path, adapter_dir: Path | None) -> Iterator[WhetError]:
    where = str(model_dir)
    if found.tokens > found.rows:
        missing = [text for text, index in found.added.items() if index >= found.rows]
        named = f", among them the added token {missing[0]!r}" if missing else ""
        yield WhetError(
            f"the tokenizer has {found.tokens} tokens but the model's embedding has {found.rows} rows: "
            f"{found.tokens - found.rows} tokens have none{named}",
            where=where,
            fix="call model.resize_token_embeddings(len(tokenizer)) before training, or use the model's own tokenizer",
        )
    if found.head_rows != found.rows:
        yield WhetError(
            f"the head has {found.head_rows} rows but the embedding {found.rows}",
            where=where,
            fix="save the model again",
        )
    config = read_json(model_dir / "config.json")
    stated = config.get("text_config", config).get("vocab_size")
    if stated != found.rows and adapter_dir is None:
        yield WhetError(
            f"vocab_size is {stated} but the embedding has {found.rows} rows",
            where=str(model_dir / "config.json"),
            fix="save the model again, with save_pretrained, which writes both",
        )


def _id_faults(found: Vocabulary, tokenizer: Any, model_dir: Path) -> Iterator[WhetError]:
    """Special ids that no token has, and an end that only one of tokenizer and model knows."""
    ends: dict[str, list[int]] = {}
    for name in ("generation_config.json", "config.json"):
        content = read_json(model_dir / name) if (model_dir / name).is_file() else {}
        for key in _IDS:
            ids = [content[key]] if isinstance(content.get(key), int) else content.get(key) or []
            if wrong := [index for index in ids if not 0 <= index < found.tokens]:
                yield WhetError(
                    f"{key} is {wrong[0]}, and the tokenizer has {found.tokens} tokens",
                    where=str(model_dir / name),
                    fix=f"set it to a token of the tokenizer, for example {getattr(tokenizer, key, None)}",
                )
            if key == "eos_token_id" and ids:
                ends[name] = ids
    # generate() goes by generation_config.json, and by config.json without it.
    for name, ids in list(ends.items())[:1]:
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
            yield WhetError(
                f"answers end with the token ids {ids} by this file, and with {tokenizer.eos_token_id} "
                f"({tokenizer.eos_token!r}) by the tokenizer",
                where=str(model_dir / name),
                fix=f'add {tokenizer.eos_token_id} to "eos_token_id", or give the tokenizer the eos it was tuned with',
            )


def _moved(tokenizer: Any, base: Any, where: Path) -> Iterator[WhetError]:
    """Tokens of the base that have another id now, or none: the model's rows are still the old ones."""
    now, before = tokenizer.get_vocab(), base.get_vocab()
    for what, texts in (
        ("have another id than in the base model", [t for t, index in before.items() if now.get(t, index) != index]),
        ("of the base model are missing", [text for text in before if text not in now]),
    ):
        if texts:
            yield WhetError(
                f"{len(texts)} tokens {what}, {min(texts, key=before.__getitem__)!r} first",
                where=str(where),
                fix="use the base model's tokenizer, and add tokens to it only by add_tokens",
            )


def _check_fingerprint(tokenizer: Any, folder: Path) -> None:
    if not (folder / NAME).is_file():
        raise WhetError(
            "the file is missing", where=str(folder / NAME), fix="give the folder of a run or of its adapter"
        )
    check(tokenizer, folder, "the model was tuned with")


def _caught(look: Callable[[], None]) -> Iterator[WhetError]:
    try:
        look()
    except WhetError as error:
        yield error


def _rows(folders: list[Path], endings: tuple[str, ...]) -> int | None:
    """Rows of the first tensor whose name ends so; None where no file holds one."""
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            for name, place in places_in(path).items():
                if name.endswith(endings):
                    return place.part.shape[0]
    return None
