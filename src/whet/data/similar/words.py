"""Texts as sequences of hashed words: what duplicates and leaks are found by.

A word is a run of letters, digits and underscores of the case-folded NFKC text (Unicode UAX #15, #21), a single
character of scripts written without spaces, a pictograph, or an operator or currency sign before a digit. The last
keeps "2+2" and "2-2" apart. All other punctuation, spacing and letter case is left out.

The hash of a run of words, and of a word as a run of characters, is a polynomial in the hashes of its parts:

    H(w_1 ... w_n) = mix(n * c + sum_k h(w_k) * M**k  mod 2**64)

M is odd, so it has an inverse, and the hash of any run comes from two prefix sums.
Equal hashes are taken for equal words: by chance that is wrong once in 2**64 comparisons. Somebody who means to can
make words that collide, and so a row that is taken for a duplicate; nothing is executed or disclosed by it.

Arrays: T words of N texts.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

_MULTIPLIER = 0x9E3779B97F4A7C15
_INVERSE = pow(_MULTIPLIER, -1, 2**64)
_LENGTH_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_AT_ONCE = 1 << 17  # characters: arrays that fit into a processor's cache
_CACHED = 1 << 20  # powers

# Kinds of characters. A word is a PART followed by PARTs and MARKs, or a character that stands ALONE, or a SIGN before
# a DIGIT or before a SPACE and a DIGIT.
_PART, _MARK, _ALONE, _SIGN, _SPACE, _DIGIT = 1, 2, 4, 8, 16, 32
_SIGNS = "-+*/^%<>=$"
_OTHER_SIGNS = "\u00d7\u00f7\u2212\u2264\u2265\u00a3\u00a5" + "".join(
    map(chr, range(0x20A0, 0x20C0))
)  # last: currencies
# Thai to Tibetan, Burmese, Khmer, kana, Han: no spaces between words.
_UNSPACED = (
    (0xE00, 0xFFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
_PICTOGRAPHS = ((0x2600, 0x27BF), (0x1F000, 0x1FAFF))
# Vowel signs and points, which are no letters but tell words apart: Latin, Hebrew, Arabic, Indic scripts.
_MARKS = (
    (0x300, 0x36F), (0x591, 0x5BD), (0x5BF, 0x5C7), (0x610, 0x61A), (0x64B, 0x65F), (0x900, 0x963), (0x971, 0xDFF),
)  # fmt: skip


def words_in(text: str) -> list[str]:
    folded = _folded(text)
    starts, ends = _spans(_codes_and_kinds(f"\0{folded}\0\0")[1])
    return [folded[start - 1 : end - 1] for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Words:
    """The words of N texts, one text after the other.

    hashes:  uint64 [T].
    offsets: int64 [N + 1]; text i has the words offsets[i] to offsets[i + 1].
    """

    hashes: Hashes
    offsets: Indices

    @property
    def lengths(self) -> Indices:
        """Words in each text, int64 [N]."""
        return np.diff(self.offsets)

    def joined(self, sizes: Sequence[int]) -> Words:
        """The same words with each `sizes[j]` consecutive texts made one."""
        ends = np.cumsum([0, *sizes], dtype=np.int64)
        return Words(self.hashes, self.offsets[ends])

    def sequences(self) -> Hashes:
        """Hash of every text's whole sequence of words, uint64 [N]."""
        return self.runs(self.offsets[:-1], self.lengths)

    def runs(self, starts: Indices, lengths: Indices | int) -> Hashes:
        """Hashes of the runs of words that start at `starts` (positions in `hashes`)."""
        return _runs(self._prefix, starts, lengths)

    def windows(self, n: int) -> tuple[Indices, Indices]:
        """(start, text) of every run of n words that lies inside one text."""
        counts = np.maximum(self.lengths - n + 1, 0)
        texts = np.repeat(np.arange(len(counts)), counts)
        return _ranges(self.offsets[:-1], counts), texts

    @cached_property
    def _prefix(self) -> Hashes:
        return _prefix_sums(self.hashes)


def words_of(texts: Sequence[str]) -> Words:
    """The words of texts: the hashes of what `words_in` finds in each."""
    parts = [_words_of(part) for part in _slices(texts)]
    lengths = np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths in parts)])
    return Words(np.concatenate([np.zeros(0, np.uint64), *(hashes for hashes, _ in parts)]), np.cumsum(lengths))


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start, characters = 0, 0
    for i, text in enumerate(texts):
        characters += len(text)
        if characters >= _AT_ONCE:
            yield texts[start : i + 1]
            start, characters = i + 1, 0
    if start < len(texts):
        yield texts[start:]


def _words_of(texts: Sequence[str]) -> tuple[Hashes, Indices]:
    """(hashes of all words [T], how many each text has [N])."""
    folded = [_folded(text) for text in texts]
    codes, kinds = _codes_and_kinds("\0" + "\0\0".join(folded) + "\0\0")
    starts, ends = _spans(kinds)
    hashes = _runs(_prefix_sums(_hashes_of(codes)), starts, ends - starts)
    text_ends = np.cumsum([len(text) + 2 for text in folded])
    return hashes, np.diff(np.searchsorted(starts, text_ends), prepend=0)


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    # Case folding can undo the normal form, so it is made again.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _codes_and_kinds(text: str) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
    codes: NDArray[np.generic]
    if text.isascii():
        codes = np.frombuffer(text.encode("ascii"), np.uint8)
    else:  # a lone surrogate is no text, yet JSON can carry one
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return codes, _kinds(128 if codes.itemsize == 1 else sys.maxunicode + 1)[codes]


def _spans(kinds: NDArray[np.uint8]) -> tuple[Indices, Indices]:
    """(start, end) of every word, in order. No word touches the first character or the last two."""
    inside = kinds & (_PART | _MARK) > 0
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    if (kinds == _MARK).any():  # no word starts with one
        parts = np.append(np.flatnonzero(kinds & _PART), len(kinds))
        starts = parts[np.searchsorted(parts, starts)]
        starts, ends = starts[starts < ends], ends[starts < ends]
    signs = np.flatnonzero(kinds == _SIGN)
    follows, then = kinds[signs + 1], kinds[signs + 2]
    signs = signs[(follows & _DIGIT > 0) | ((follows == _SPACE) & (then & _DIGIT > 0))]
    alone = np.union1d(signs, np.flatnonzero(kinds & _ALONE))
    at = np.searchsorted(starts, alone)
    return np.insert(starts, at, alone), np.insert(ends, at, alone + 1)


@lru_cache
def _kinds(count: int) -> NDArray[np.uint8]:
    """The kind of each of the first `count` characters. Letters and digits: as Unicode has them, and the underscore."""
    kinds = np.zeros(count, np.uint8)
    for code in range(count):
        character = chr(code)
        if character.isalnum():
            kinds[code] = _PART | _DIGIT if character.isdecimal() else _PART
        elif character.isspace():
            kinds[code] = _SPACE
    kinds[ord("_")] = _PART
    for first, last in _MARKS:
        marks = kinds[first : last + 1]
        marks[marks == 0] = _MARK
    for first, last in (*_UNSPACED, *_PICTOGRAPHS, *((ord(sign), ord(sign)) for sign in _OTHER_SIGNS)):
        kinds[first : last + 1] = (kinds[first : last + 1] & _DIGIT) | _ALONE
    kinds[[ord(sign) for sign in _SIGNS]] = _SIGN
    return kinds


def _hashes_of(codes: NDArray[np.generic]) -> Hashes:
    if codes.itemsize == 1:
        hashes: Hashes = _ascii_hashes()[codes]
        return hashes
    return mix((codes.astype(np.uint64) + np.uint64(1)) * np.uint64(_MULTIPLIER))


@lru_cache
def _ascii_hashes() -> Hashes:
    return _hashes_of(np.arange(128, dtype=np.uint32))


def _prefix_sums(hashes: Hashes) -> Hashes:
    """What `_runs` takes differences of [T + 1]."""
    sums = np.zeros(len(hashes) + 1, np.uint64)
    np.cumsum(hashes * _powers(_MULTIPLIER, len(hashes)), out=sums[1:])
    return sums


def _runs(prefix: Hashes, starts: Indices, lengths: Indices | int) -> Hashes:
    raw = (prefix[starts + lengths] - prefix[starts]) * _powers(_INVERSE, len(prefix))[starts]
    return mix(raw + np.asarray(lengths, dtype=np.uint64) * _LENGTH_FACTOR)


def mix(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection after which every bit depends on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(base: int, count: int) -> Hashes:
    """base**0 ... base**(count - 1), modulo 2**64."""
    return _first_powers(base)[:count] if count <= _CACHED else _computed_powers(base, count)


@lru_cache
def _first_powers(base: int) -> Hashes:
    return _computed_powers(base, _CACHED)


def _computed_powers(base: int, count: int) -> Hashes:
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _ranges(firsts: Indices, counts: Indices) -> Indices:
    """firsts[0], firsts[0] + 1, ... (counts[0] of them), then firsts[1], ..."""
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(int(counts.sum()))
