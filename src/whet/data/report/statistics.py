"""What a data card says of texts, without keeping any: counts that merge exactly, in any order.

    stats = of_batch(texts[:10_000]).merge(of_batch(texts[10_000:]))     # == of_batch(texts)

Lengths are counted between fixed edges, eight an octave, so a quantile is known to within 9% (2^(1/8)) of itself, and
exactly below 13 characters.

Languages are told of a sample, because telling one costs more than all the rest. A text's level is the number of
leading zero bits of its digest, so half of all texts reach level 1, a quarter level 2. The sample is the texts of at
least level L, with the smallest L that leaves at most `SAMPLE` of them. L and the sample rest on the set of texts
alone, and only counts by level are kept. Source: adaptive sampling, P. Flajolet 1990, doi:10.1007/BF02241657.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np

from whet.errors import WhetError

EDGES = tuple(sorted({0, *(round(2 ** (i / 8)) for i in range(8 * 40))}))
"""Lower edges of the classes of length, in characters; the last has no upper one."""

SAMPLE = 1024
"""Texts at most whose language is told. A share of one half is then known to about 4 points (two sigma, 512 texts)."""

HEAD = 600
"""Characters of a text that its language is told from."""

UNSURE, NO_LANGUAGE = "und", "zxx"
"""ISO 639-2's codes for a language that could not be told, and for text that is none (numbers, markup)."""

Languages = dict[str, int]
K = TypeVar("K", int, str)


@dataclass(frozen=True)
class Stats:
    """Counts of a set of texts, one text a row.

    lengths: lower edge of a class -> rows whose length in characters is in it.
    non_ascii, replaced: characters outside ASCII, and U+FFFD, which stands where a byte was not understood.
    damaged: rows with a U+FFFD.
    level, sampled: the sample's lowest level, and level -> language -> rows, as in the module's docstring.
    """

    rows: int = 0
    characters: int = 0
    shortest: int | None = None
    longest: int | None = None
    lengths: Mapping[int, int] = field(default_factory=dict)
    non_ascii: int = 0
    replaced: int = 0
    damaged: int = 0
    level: int = 0
    sampled: Mapping[int, Languages] = field(default_factory=dict)

    def merge(self, other: Stats) -> Stats:
        """The counts of both sets together. Associative and commutative; `Stats()` changes nothing."""
        level, sampled = _cut_to_size(max(self.level, other.level), _add_levels(self.sampled, other.sampled))
        return Stats(
            rows=self.rows + other.rows,
            characters=self.characters + other.characters,
            shortest=_of_both(min, self.shortest, other.shortest),
            longest=_of_both(max, self.longest, other.longest),
            lengths=_sorted(Counter(self.lengths) + Counter(other.lengths)),
            non_ascii=self.non_ascii + other.non_ascii,
            replaced=self.replaced + other.replaced,
            damaged=self.damaged + other.damaged,
            level=level,
            sampled=sampled,
        )

    @property
    def languages(self) -> Languages:
        """ISO 639 code -> rows of the sample, the most frequent first."""
        total: Counter[str] = Counter()
        for counts in self.sampled.values():
            total.update(counts)
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    @property
    def sample_size(self) -> int:
        """Rows whose language was told."""
        return sum(self.languages.values())

    def quantile(self, share: float) -> int | None:
        """The length, in characters, that `share` of the rows do not pass, to within a class of `lengths`.

        None without rows; the shortest and longest length at 0 and 1, exactly.
        """
        if self.rows == 0 or self.shortest is None or self.longest is None:
            return None
        if share <= 0:
            return self.shortest
        seen = 0
        for edge, count in self.lengths.items():
            seen += count
            if seen >= share * self.rows:
                return min(max(_upper_edge(edge), self.shortest), self.longest)
        return self.longest

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives back an equal Stats."""
        return {
            "rows": self.rows,
            "characters": self.characters,
            "shortest": self.shortest,
            "longest": self.longest,
            "lengths": {str(edge): count for edge, count in self.lengths.items()},
            "non_ascii": self.non_ascii,
            "replaced": self.replaced,
            "damaged": self.damaged,
            "level": self.level,
            "sampled": {str(level): counts for level, counts in self.sampled.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Stats:
        """Raises WhetError when `value` is not what `to_json` wrote."""
        try:
            by_number = {name: {int(key): item for key, item in value[name].items()} for name in ("lengths", "sampled")}
            return cls(**{**value, **by_number})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise WhetError(
                "the statistics are not as whet writes them", where="statistics", fix="make the version again"
            ) from error


def of_batch(texts: Sequence[str]) -> Stats:
    """The counts of these texts. Cost: some microseconds a text of 1,000 characters, and `SAMPLE` languages at most."""
    if not texts:
        return Stats()
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    # Whether a text is ASCII is known to Python without reading it: only the others are looked into.
    others = [text for text in texts if not text.isascii()]
    replaced = [text.count("\ufffd") for text in others]
    level, sampled = _sample(texts)
    return Stats(
        rows=len(texts),
        characters=int(lengths.sum()),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        lengths=_histogram(lengths),
        non_ascii=sum(len(text) - len(text.encode("ascii", "ignore")) for text in others),
        replaced=sum(replaced),
        damaged=sum(map(bool, replaced)),
        level=level,
        sampled=sampled,
    )


# ---------------------------------------------------------------- lengths


def _histogram(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> dict[int, int]:
    counts = np.bincount(np.searchsorted(EDGES, lengths, side="right") - 1)
    return {EDGES[i]: int(counts[i]) for i in np.flatnonzero(counts)}


def _upper_edge(edge: int) -> int:
    """The greatest length of the class that begins at `edge`."""
    after = EDGES.index(edge) + 1
    return EDGES[after] - 1 if after < len(EDGES) else edge


# ---------------------------------------------------------------- languages


def _sample(texts: Sequence[str]) -> tuple[int, dict[int, Languages]]:
    levels = [_level(text) for text in texts]
    lowest = _lowest_level(Counter(levels), 0)
    sampled: dict[int, Counter[str]] = {}
    for text, level in zip(texts, levels, strict=True):
        if level >= lowest:
            sampled.setdefault(level, Counter())[language(text)] += 1
    return lowest, {level: _sorted(sampled[level]) for level in sorted(sampled)}


def _level(text: str) -> int:
    """Leading zero bits of the text's 64-bit digest."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return 64 - int.from_bytes(digest, "big").bit_length()


def _lowest_level(rows_at: Mapping[int, int], at_least: int) -> int:
    """The smallest level, from `at_least` up, that no more than `SAMPLE` rows reach."""
    reached = 0
    for level in sorted(rows_at, reverse=True):
        reached += rows_at[level]
        if reached > SAMPLE:
            return max(level + 1, at_least)
    return at_least


def _cut_to_size(at_least: int, sampled: Mapping[int, Languages]) -> tuple[int, dict[int, Languages]]:
    lowest = _lowest_level({level: sum(counts.values()) for level, counts in sampled.items()}, at_least)
    return lowest, {level: sampled[level] for level in sorted(sampled) if level >= lowest}


def _add_levels(one: Mapping[int, Languages], other: Mapping[int, Languages]) -> dict[int, Languages]:
    return {
        level: _sorted(Counter(one.get(level, {})) + Counter(other.get(level, {}))) for level in sorted({*one, *other})
    }


def language(text: str) -> str:
    """ISO 639 code of the language that `text` begins in, UNSURE below a probability of one half, or NO_LANGUAGE."""
    code, _ = _identifier().classify(text[:HEAD])
    return str(code)


@cache
def _identifier() -> Any:
    """py3langid's naive Bayes over byte n-grams, 139 languages; its model comes in its package and holds no pickle."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=0.5)


# ---------------------------------------------------------------- small helpers


def _sorted(counts: Mapping[K, int]) -> dict[K, int]:
    return dict(sorted(counts.items()))


def _of_both(pick: Callable[[Iterable[int]], int], one: int | None, other: int | None) -> int | None:
    known = [value for value in (one, other) if value is not None]
    return pick(known) if known else None
