"""The tokenizer.json in a GGUF file, which whet writes where llama.cpp's own tokenizer only comes close to it.

Who asks llama.cpp with token ids, as `whet serve` does, cuts text by it exactly as transformers does. The key is the
GGUF specification's; llama.cpp passes over it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gguf import Keys
from tokenizers import Tokenizer

from whet.errors import WhetError

KEY: str = Keys.Tokenizer.HF_JSON


def to_carry(spec: dict[str, Any]) -> str:
    """`spec`, the JSON of a tokenizer, without the settings that belong to a batch."""
    return json.dumps({**spec, "truncation": None, "padding": None}, ensure_ascii=False)


class Carried:
    """Cuts text as transformers does."""

    def __init__(self, content: str, vocabulary: int, where: str):
        """content: the tokenizer.json. vocabulary: how many tokens the file has.

        Raises WhetError where it is none, or has tokens that the model lacks.
        """
        fix = "export the model again"
        try:
            self._backend = Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises nothing more precise
            raise WhetError(f"{KEY} in the file is no tokenizer: {error}", where=where, fix=fix) from None
        largest = max(self._backend.get_vocab().values(), default=-1)
        if largest >= vocabulary:
            what = f"{KEY} in the file has the token id {largest}, and the model has {vocabulary} tokens"
            raise WhetError(what, where=where, fix=fix)
        self._backend.no_truncation()
        self._backend.no_padding()

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, special tokens parsed, no BOS or EOS added."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]
