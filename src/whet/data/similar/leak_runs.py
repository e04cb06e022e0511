"""The runs of words of held-out texts that the leak gate looks for, as hashes, and which text each is reported for.

A run is GRAM words of a text, or all words of a text of SHORTEST to GRAM - 1; a window is WINDOW words. What they are
for: leaks.py. Arrays: U texts of T words in all, G different runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.data.similar.duplicates import Flags
from whet.data.similar.lookup import filter_of
from whet.data.similar.words import Hashes, Indices, words_of

GRAM = 13
SHORTEST = 8  # words of a text that is looked for inside others; shorter ones must be a whole part
WINDOW = 5
COVERED = 0.8

_AT_ONCE = 1024  # texts


@dataclass(frozen=True)
class HeldOut:
    """Hashes of all that is looked for: each text's words [U], its windows, its runs; lengths: in words [U]."""

    lengths: Indices
    sequences: Hashes
    windows: Hashes
    grams: Hashes
    short: Flags  # texts whose only run is all of them


def hashes_of(texts: Sequence[str], whole: Flags) -> HeldOut:
    lengths, sequences, windows, grams, shorts = [], [], [], [], []
    for i in range(0, len(texts), _AT_ONCE):
        words = words_of(texts[i : i + _AT_ONCE])
        short = whole[i : i + _AT_ONCE] & (words.lengths >= SHORTEST) & (words.lengths < GRAM)
        starts = np.flatnonzero(starting(words.lengths, GRAM, short))
        texts_of = np.searchsorted(words.offsets, starts, side="right") - 1
        lengths.append(words.lengths)
        sequences.append(words.sequences())
        windows.append(words.runs(words.windows(WINDOW)[0], WINDOW))
        grams.append(words.runs(starts, np.minimum(words.lengths[texts_of], GRAM)))
        shorts.append(short)
    return HeldOut(
        _joined(lengths, np.int64),
        _joined(sequences, np.uint64),
        _joined(windows, np.uint64),
        _joined(grams, np.uint64),
        _joined(shorts, np.bool_),
    )


def _joined(parts: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    """The parts one after the other; the list is emptied, since there may be no room for both."""
    joined = np.concatenate([np.zeros(0, kind), *parts])
    parts.clear()
    return joined


def starting(lengths: Indices, run: int, short: Flags | None = None) -> Flags:
    """Words of all texts at which a run of that many words starts, and the first words of texts that are `short`."""
    ends = np.cumsum(lengths)
    starts: Flags = np.ones(int(lengths.sum()), np.bool_)
    for left in range(1, run):  # words from here to the text's end
        starts[(ends - left)[lengths >= left]] = False
    if short is not None:
        starts[(ends - lengths)[short]] = True
    return starts


def runs_of(hashed: HeldOut) -> dict[str, Any]:
    """The arrays of `LeakIndex` that are about runs."""
    lengths = hashed.lengths
    starts = starting(lengths, GRAM, hashed.short)
    grams, place_gram = numbered(hashed.grams, starts)
    gram = place_gram[starts]
    # Reported for the shortest text that has it; of equally short ones, the first.
    by_length = np.argsort(lengths, kind="stable")
    rank = np.empty(len(lengths), np.int32)
    rank[by_length] = np.arange(len(lengths))
    ranks = np.repeat(rank, lengths)[starts]
    first, last = np.full(len(grams), len(lengths), np.int32), np.full(len(grams), -1, np.int32)
    np.minimum.at(first, gram, ranks)
    np.maximum.at(last, gram, ranks)
    gram_text, single = by_length[first].astype(np.int32), first == last
    with_own = np.zeros(len(lengths), np.bool_)
    with_own[gram_text[single]] = True
    # A text whose runs all lie in others counts those that are reported for it.
    own = single | ~with_own[gram_text]
    short = hashed.short[gram_text]
    return {
        "grams": grams,
        "grams_filter": filter_of(grams),
        "place_gram": place_gram,
        "gram_text": gram_text,
        "own": own,
        "strong": np.zeros(len(grams), np.bool_),
        "short": short,
        "needed": np.ceil(COVERED * np.bincount(gram_text[own], minlength=len(lengths)) - 1e-9).astype(np.int64),
        "lengths": np.unique(np.where(short, lengths[gram_text], GRAM)),
    }


def numbered(hashes: Hashes, starts: Flags) -> tuple[Hashes, NDArray[np.int32]]:
    """(the different hashes, sorted; the number of the one that starts at each word, or -1)."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    first = np.ones(len(ordered), np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    numbers = np.empty(len(ordered), np.int32)
    numbers[order] = np.cumsum(first, dtype=np.int32) - 1
    place = np.full(len(starts), -1, np.int32)
    place[starts] = numbers
    return ordered[first], place
