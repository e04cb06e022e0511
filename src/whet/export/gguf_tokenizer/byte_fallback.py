"""BPE with byte fallback on "▁"-marked text, SentencePiece's kind: scores that stand for merges.

llama.cpp joins any two neighbours whose joint text is a token, best score of that token first, leftmost first among
equals. transformers joins pairs in the order of the merges. `scores` finds scores for which both do the same, or raises
WhetError. Source: llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby, pairwise
from typing import Any

from whet.errors import WhetError
from whet.export.gguf_tokenizer.byte_level import pair

Merge = tuple[str, str]


def byte_token(text: str) -> int | None:
    """65 for "<0x41>", None for a token that stands for no byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def check_bytes(vocab: Iterable[str], where: str) -> None:
    """llama.cpp ends the process at a byte it has no token for."""
    present = {byte_token(text) for text in vocab} | {ord(text) for text in vocab if len(text) == 1 and text < "\x80"}
    if missing := set(range(256)) - present:
        raise WhetError(
            f"the vocabulary has no token for {len(missing)} of the 256 bytes, the first <0x{min(missing):02X}>",
            where=where,
            fix="train the tokenizer with byte fallback, with all byte tokens in its vocabulary",
        )


def scores(model: dict[str, Any], extracted: set[str], where: str) -> dict[str, float]:
    """Token -> score, for every token that merges can lead to.

    model: the `model` of tokenizer.json. extracted: added tokens, which are cut out of a text before merging, so that
    no merge ever sees them.
    """
    merges = [pair(merge) for merge in model["merges"]]
    reached = _reached(model["vocab"], merges, extracted)
    live = [(left, right) for left, right in merges if left in reached and right in reached and left + right in reached]
    _check_every_split_is_a_merge(model["vocab"], reached, set(live), extracted, where)
    order: dict[str, float] = {}
    for rank, tokens in enumerate(_tied(live, where)):
        order.update(dict.fromkeys(tokens, -float(rank + 1)))
    return order


def _reached(vocab: dict[str, int], merges: list[Merge], extracted: set[str]) -> set[str]:
    """The tokens that merges lead to from single characters, those among them."""
    reached = {text for text in vocab if len(text) == 1 and text not in extracted}
    grown = True
    while grown:
        before = len(reached)
        reached.update(
            left + right
            for left, right in merges
            if left in reached and right in reached and left + right not in extracted
        )
        grown = len(reached) > before
    return reached


def _check_every_split_is_a_merge(
    vocab: dict[str, int], reached: set[str], merges: set[Merge], extracted: set[str], where: str
) -> None:
    """Raises WhetError for two neighbours that llama.cpp would join and transformers would not."""

    def stands_alone(text: str) -> bool:
        return text in reached or (len(text) == 1 and text not in extracted)

    for token in vocab:
        if token in extracted or byte_token(token) is not None:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if (left, right) not in merges and stands_alone(left) and stands_alone(right):
                raise WhetError(
                    f"llama.cpp would merge {left!r} and {right!r}, which are both tokens as is {token!r}, but this "
                    "tokenizer has no such merge",
                    where=where,
                    fix="use a byte-level BPE tokenizer, or one converted from SentencePiece",
                )


def _tied(merges: list[Merge], where: str) -> list[set[str]]:
    """The merged tokens in the order of their merges, those together that need the same score.

    The merges of one token follow each other, but for runs of one character, which SentencePiece gives one score and
    transformers ranks longest first. Whether both then cut such runs alike is tried out.
    """
    groups: list[set[str]] = []
    place: dict[str, int] = {}
    for token, _ in groupby(left + right for left, right in merges):
        if (again := place.get(token)) is None:
            place[token] = len(groups)
            groups.append({token})
        else:
            joined = set().union(*groups[again:])
            groups[again:] = [joined]
            place.update(dict.fromkeys(joined, again))
    for group in groups:
        if len(group) > 1 and not _runs_come_out_alike(group, groups, merges):
            raise WhetError(
                f"the merges of the token {min(group)!r} do not follow each other, as scores need", where=where
            )
    return groups


def _runs_come_out_alike(tied: set[str], groups: list[set[str]], merges: list[Merge]) -> bool:
    """The tied tokens are runs of one character, and runs of it are cut the same by merges and by scores."""
    from tokenizers.models import BPE

    characters = set("".join(tied))
    if len(characters) != 1:
        return False
    (character,) = characters
    places = {len(text): place for place, group in enumerate(groups) for text in group if set(text) == characters}
    own = [(left, right) for left, right in merges if set(left + right) == characters]
    bpe = BPE(vocab={character * length: length for length in (1, *places)}, merges=own)
    longest = max(places)
    return all(
        [token.id for token in bpe.tokenize(character * run)] == _cut_by_scores(run, places)
        for run in (*range(2, longest + 4), 2 * longest, 2 * longest + 1)
    )


def _cut_by_scores(run: int, places: dict[int, int]) -> list[int]:
    """The lengths llama.cpp cuts a run of one character into. places: length of a token -> its place among scores."""
    lengths = [1] * run
    while True:
        joined = [left + right for left, right in pairwise(lengths)]
        at = min(
            (index for index, length in enumerate(joined) if length in places),
            key=lambda index: places[joined[index]],
            default=None,
        )
        if at is None:
            return lengths
        lengths[at : at + 2] = [joined[at]]
