"""What llama.cpp makes of a text by the tokenizer in a file, told without it: for all that it does otherwise.

llama.cpp cuts out special tokens first, the longest of them all before others, and with some the blanks that follow.
What is left between them is cut piece by piece, and a piece comes out the same wherever it stands.
Source: llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gguf import TokenType
from tokenizers import Tokenizer
from tokenizers.models import BPE

from whet.export.gguf_tokenizer import byte_level
from whet.export.gguf_tokenizer.added import NEVER_STRIPPED
from whet.export.gguf_tokenizer.space_prefix import SPACE
from whet.export.gguf_tokenizer.written import GGUFTokenizer

_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
_BLANKS = " \t\n\v\f\r"  # C's isspace

Fragment = str | int
"""Text, or the id of a special token."""


def llama_cpp_cut(written: GGUFTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, special tokens parsed, no BOS or EOS added."""
    special = [i for i, kind in enumerate(written.types) if kind in _SPECIAL]
    special.sort(key=lambda i: -len(written.tokens[i].encode()))
    fragments = [list(_fragments(text, special, written)) for text in texts]
    pieces = list(dict.fromkeys(one for found in fragments for one in found if isinstance(one, str)))
    merged = dict(zip(pieces, _merged(written, pieces), strict=True))
    return [[i for one in found for i in (merged[one] if isinstance(one, str) else [one])] for found in fragments]


def _fragments(text: str, special: Sequence[int], written: GGUFTokenizer) -> Iterator[Fragment]:
    found: list[Fragment] = [text] if text else []
    for index in special:
        token = written.tokens[index]
        if token in text:
            strips = written.strips_right and token not in NEVER_STRIPPED
            found = [
                part for one in found for part in (_split(one, token, index, strips) if isinstance(one, str) else [one])
            ]
    yield from found


def _split(text: str, token: str, index: int, strips: bool) -> Iterator[Fragment]:
    first, *others = text.split(token)
    if first:
        yield first
    for other in others:
        yield index
        if rest := other.lstrip(_BLANKS) if strips else other:
            yield rest


def _merged(written: GGUFTokenizer, pieces: Sequence[str]) -> list[list[int]]:
    """The token ids of texts without special tokens in them."""
    vocab = {text: i for i, text in enumerate(written.tokens)}
    merges = [byte_level.pair(merge) for merge in written.merges]
    if written.model == "llama":
        prefix = SPACE if written.add_space_prefix else ""
        backend = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True))
        pieces = [prefix + piece.replace(" ", SPACE) for piece in pieces]
    else:
        pre = byte_level.known(written.pre)
        backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words_first))
        backend.pre_tokenizer = byte_level.built(pre.followed or pre.steps)
    return [encoding.ids for encoding in backend.encode_batch(list(pieces), add_special_tokens=False)]
