"""Which of many hashes are in a large sorted array: a bit array ends most misses before the binary search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from whet.data.similar.words import Hashes, Indices


def filter_of(hashes: Hashes) -> NDArray[np.uint8]:
    """One bit for each value of the hashes' high bits; eight to sixteen bits a hash, so that most misses end here."""
    bits = max(3, int(8 * len(hashes)).bit_length())
    present = np.zeros(1 << bits, np.bool_)
    present[hashes >> np.uint64(64 - bits)] = True
    return np.packbits(present, bitorder="little")


def find_hashes(values: Hashes, bits: NDArray[np.uint8], hashes: Hashes) -> tuple[Indices, Indices]:
    """(which of `hashes` are among the sorted `values`, where)."""
    high = hashes >> np.uint64(65 - len(bits).bit_length() - 3)
    maybe = np.flatnonzero(bits[high >> np.uint64(3)] >> (high & np.uint64(7)).astype(np.uint8) & 1)
    place = np.searchsorted(values, hashes[maybe])
    place = np.minimum(place, max(len(values) - 1, 0))
    hit = values[place] == hashes[maybe] if len(values) else np.zeros(len(maybe), np.bool_)
    return maybe[hit], place[hit]
