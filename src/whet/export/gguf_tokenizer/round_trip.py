"""Does llama.cpp cut text as transformers does? Asked of both, on many strings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.export import llama_cpp
from whet.export.gguf_tokenizer.strings import strings


@dataclass(frozen=True)
class Difference:
    """A text that two tokenizers cut differently: the token ids of transformers, and those of llama.cpp."""

    text: str
    transformers: list[int]
    llama_cpp: list[int]


def differences(tokenizer: Any, gguf: Path, texts: Sequence[str] | None = None) -> list[Difference]:
    """The texts that llama.cpp, with the vocabulary in the file `gguf`, cuts otherwise than `tokenizer`.

    tokenizer: a fast tokenizer of transformers. texts: None for 2,000 strings with its special tokens in them.
    Text is given in NFC where the tokenizer asks for NFC, since llama.cpp leaves that to its caller.
    Raises WhetError where llama.cpp is not installed.
    """
    texts = list(strings(special=tuple(tokenizer.all_special_tokens)) if texts is None else texts)
    backend = tokenizer.backend_tokenizer
    normalizer = json.loads(backend.to_str())["normalizer"]
    if normalizer and normalizer["type"] == "NFC":
        texts = [backend.normalizer.normalize_str(text) for text in texts]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    found = llama_cpp.tokenize(gguf, texts)
    return [
        Difference(text, ours, theirs)
        for text, ours, theirs in zip(texts, expected, found, strict=True)
        if ours != theirs
    ]
