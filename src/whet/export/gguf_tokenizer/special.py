"""Special tokens: those around every text, those with a meaning of their own, and those that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.export.json_files import read_json

# These end an answer in llama.cpp wherever they are in the vocabulary, whatever the file says.
ALWAYS_STOPS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"})


def added_around_text(tokenizer: Any, where: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text; found by asking it."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise WhetError(
        f"the tokenizer adds more than BOS and EOS around a text (token ids {whole} for 'a'), which GGUF cannot say",
        where=where,
        fix="remove the post-processor from tokenizer.json and put such tokens into the chat template",
    )


def special_ids(tokenizer: Any, model_dir: Path, where: str, notes: list[str]) -> dict[str, int]:
    """GGUF's name -> token id: bos, eos, unknown, padding, mask, and eot and eom for further tokens that end a turn."""
    if tokenizer.eos_token_id is None:
        raise WhetError(
            "the tokenizer has no eos token, and llama.cpp would take another token for it",
            where=where,
            fix='set it, for example tokenizer.eos_token = "<|im_end|>", and save the tokenizer again',
        )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
    ids = {gguf: getattr(tokenizer, f"{hf}_token_id") for hf, gguf in names.items()}
    ids = {name: index for name, index in ids.items() if index is not None}
    ids.update(_further_stops(tokenizer, model_dir, notes))
    return ids


def _further_stops(tokenizer: Any, model_dir: Path, notes: list[str]) -> dict[str, int]:
    """eot and eom: the stop tokens of generation_config.json that llama.cpp would not know by their text first."""
    stops = [index for index in generation_stops(model_dir) if index != tokenizer.eos_token_id]
    texts = {index: tokenizer.convert_ids_to_tokens(index) for index in stops}
    stops.sort(key=lambda index: texts[index] in ALWAYS_STOPS)
    for index in stops[2:]:
        if texts[index] not in ALWAYS_STOPS:
            notes.append(f"GGUF has no room for the stop token {texts[index]!r} ({index})")
    return dict(zip(("eot", "eom"), stops, strict=False))


def generation_stops(model_dir: Path) -> list[int]:
    """The ids in generation_config.json that end an answer, each once; none without the file."""
    path = model_dir / "generation_config.json"
    stops = read_json(path).get("eos_token_id") if path.is_file() else None
    return [] if stops is None else [stops] if isinstance(stops, int) else list(dict.fromkeys(stops))
