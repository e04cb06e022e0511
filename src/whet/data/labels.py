"""Labels out of character positions: a token is learned from when its first character lies in a span to learn from.

Templates (template.py) and markers (markers.py) find the spans in different ways, and meet here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from whet.errors import WhetError

IGNORE = -100
"""The label of a token that takes no part in the loss."""

Span = tuple[int, int]
"""First character, and the one after the last."""


def labels_in(spans: Sequence[Span], input_ids: Iterable[int], positions: Iterable[int]) -> list[int]:
    """Labels [T]: the id of each token that begins inside a span, IGNORE elsewhere. Spans are in order and apart.

    input_ids, positions: [T], the second from `first_characters`.
    """
    starts = [start for start, _ in spans]
    labels = []
    for token, position in zip(input_ids, positions, strict=True):
        i = bisect_right(starts, position) - 1
        labels.append(token if i >= 0 and position < spans[i][1] else IGNORE)
    return labels


def first_characters(offsets: Iterable[Span]) -> list[int]:
    """The position of each token's first character. Some tokenizers leave spaces out of a token's offsets: one made of
    nothing else has an empty span, and begins where the token before it ended."""
    positions = []
    previous_end = 0
    for start, end in offsets:
        positions.append(start if start < end else previous_end)
        previous_end = end
    return positions


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise WhetError(
            "the tokenizer cannot say which characters a token covers",
            where="tokenizer",
            fix="load it with AutoTokenizer from a folder that holds tokenizer.json",
        )
