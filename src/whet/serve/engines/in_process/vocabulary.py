"""What the engine needs of a tokenizer: prompts to tokens, tokens to text and to bytes, and which tokens end."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # SentencePiece's


class Vocabulary:
    """A tokenizer and the tokens that end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], size: int):
        self.tokenizer, self.ends, self.size = tokenizer, frozenset(ends), size
        self._byte_level = SPACE not in "".join(tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), 1000)))))
        self._added = frozenset(tokenizer.added_tokens_decoder)
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            # set once and for all: encoding would else do so, while another thread decodes
            backend.no_truncation()
            backend.no_padding()
        self.bytes_of = functools.lru_cache(maxsize=65_536)(self._bytes_of)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids. special: with the tokens that the tokenizer puts around a text, BOS mostly."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text. special: special tokens are written out, in place of left out."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        return str(text)

    def _bytes_of(self, token: int) -> bytes:
        """The bytes of the text that a token stands for; none for a token that the tokenizer lacks."""
        name: Any = self.tokenizer.convert_ids_to_tokens(token) if token < len(self.tokenizer) else None
        if name is None:
            return b""
        if token in self._added:
            return str(name).encode()
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        if self._byte_level and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        return str(name).replace(SPACE, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte by character: printable bytes stand for themselves, the others for U+0100 onwards in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
