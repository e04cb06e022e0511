"""Exact and near duplicates among millions of texts, by MinHash and locality-sensitive hashing.

    exact   equal texts: 128 bits of BLAKE2b
    near    similar sets of 5-word shingles: Jaccard |A & B| / |A | B| >= threshold

A signature holds P = 128 values; the share of places in which two signatures agree estimates the Jaccard similarity,
with a standard error of at most sqrt(J (1 - J) / P), 0.03 at 0.85. The places are cut into B bands of r; texts that
agree in a whole band are candidates, and candidates whose estimate reaches the threshold are duplicates. A pair of
similarity J becomes a candidate with probability

    P(J) = 1 - (1 - J**r)**B,   B = floor(128 / r)

and r is the largest for which P(threshold) >= 0.99. Clusters are the connected components of these pairs, so two
members of one cluster may be less alike than the threshold.

What it does not see: texts whose only difference is a few words in a long shared frame (a number at the end of a page,
another question about one passage) are similar by this measure. Where many rows share a frame (an instruction, a system
prompt), pass its shingles as `common`, and the rest of each text decides.

Sources: Broder 1997, "On the resemblance and containment of documents" (shingles, MinHash); Lee et al. 2022,
arXiv:2107.06499 (duplicates in training sets); Dahlgaard et al. 2017, arXiv:1704.04370 (the sketch that rensa builds).
Arrays: N rows, U distinct texts, B bands, P places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from whet.data.similar.words import Hashes, Indices, Words, mix, words_of
from whet.errors import WhetError

SHINGLE = 5  # words
PLACES = 128
FOUND = 0.99  # of the pairs at the threshold
SEED = 42  # of rensa's hash functions; signatures of different seeds do not compare

# A bucket of up to WINDOW + 1 rows is compared pair by pair. In a larger one each row meets its WINDOW neighbours (in
# the order of the next band, which brings like rows together) and at most REPRESENTATIVES rows that stand for the rest.
WINDOW = 4
REPRESENTATIVES = 16

_AT_ONCE = 1 << 14  # pairs compared at a time: 16 MB of signatures
# Texts and tokens that rensa is given at a time: few enough that it starts no threads, which would take cores from the
# other workers and hang a process forked from this one. A single text of 65,536 shingles starts them all the same.
_TEXTS_AT_ONCE = 128
_TOKENS_AT_ONCE = 1 << 14

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Signatures:
    """What is kept of N texts. The arrays may be memory maps. Without a threshold B = P = 0.

    exact: uint64 [N, 2]; bands: uint64 [N, B]; minhash: uint32 [N, P].
    """

    exact: NDArray[np.uint64]
    bands: NDArray[np.uint64]
    minhash: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.exact)

    @classmethod
    def concatenate(cls, parts: Sequence[Signatures]) -> Signatures:
        return cls(
            np.concatenate([part.exact for part in parts]),
            np.concatenate([part.bands for part in parts]),
            np.concatenate([part.minhash for part in parts]),
        )


# ---------------------------------------------------------------- signatures


def banding(threshold: float) -> tuple[int, int]:
    """(bands, places in each) for a threshold; the formula is at the top. Raises WhetError outside (0, 1]."""
    if not 0 < threshold <= 1:
        raise WhetError(
            f"a similarity threshold of {threshold} is no share", where="dedup.threshold", fix="use 0.85, say"
        )
    for rows in range(PLACES, 1, -1):
        bands = PLACES // rows
        if 1 - (1 - threshold**rows) ** bands >= FOUND:
            return bands, rows
    return PLACES, 1


def sign(texts: Sequence[str], threshold: float | None, common: Hashes | None = None) -> Signatures:
    """The signatures of texts, each resting on its own text alone.

    threshold: the one that `clusters` will be called with; None for exact duplicates only.
    common: sorted hashes of shingles to leave out, from `common_shingles`.

    A text without a shingle (fewer than 5 words, or common ones only) stands for itself: it is near another only if
    all their words are equal, in order. A text without words is near none but its exact duplicates.
    """
    exact = np.array([_exact(text) for text in texts], dtype="<u8").astype(np.uint64).reshape(-1, 2)
    if threshold is None:
        return Signatures(exact, np.zeros((len(texts), 0), np.uint64), np.zeros((len(texts), 0), np.uint32))
    bands, rows = banding(threshold)
    minhash = np.concatenate(
        [np.zeros((0, PLACES), np.uint32)]
        + [
            _minhash(*_tokens(words_of(texts[i : i + _TEXTS_AT_ONCE]), exact[i : i + _TEXTS_AT_ONCE, 0], common))
            for i in range(0, len(texts), _TEXTS_AT_ONCE)
        ]
    )
    return Signatures(exact, _bands(minhash, bands, rows), minhash)


def common_shingles(texts: Iterable[str], share: float = 0.05, *, at_least: int = 20) -> Hashes:
    """Hashes, sorted, of the shingles in more than `share` of the distinct texts and in more than `at_least` of them.

    Made for a sample of the rows that does not depend on their order (say those whose id starts with 00). Texts with
    thousands of near copies make their own shingles common too, and are then told apart by the rest.
    """
    found: Counter[int] = Counter()
    distinct = sorted(set(texts))
    for i in range(0, len(distinct), _TEXTS_AT_ONCE):
        words = words_of(distinct[i : i + _TEXTS_AT_ONCE])
        starts, owners = words.windows(SHINGLE)
        for shingles in np.split(words.runs(starts, SHINGLE), np.flatnonzero(np.diff(owners)) + 1):
            found.update(set(shingles.tolist()))
    limit = max(share * len(distinct), at_least)
    return np.array(sorted(shingle for shingle, count in found.items() if count > limit), dtype=np.uint64)


def _exact(text: str) -> tuple[int, int]:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _tokens(words: Words, exact: Hashes, common: Hashes | None) -> tuple[Hashes, Indices]:
    """(hashes of shingles, offsets [N + 1]) of what the MinHash of each text is taken of. No text has none."""
    starts, owners = words.windows(SHINGLE)
    shingles = words.runs(starts, SHINGLE)
    if common is not None and len(common):
        place = np.minimum(np.searchsorted(common, shingles), len(common) - 1)
        rare = common[place] != shingles
        shingles, owners = shingles[rare], owners[rare]
    counts = np.bincount(owners, minlength=len(words.lengths))
    bare = np.flatnonzero(counts == 0)
    itself = np.where(words.lengths == 0, mix(exact), words.sequences())
    tokens = np.insert(shingles, np.searchsorted(owners, bare), itself[bare])
    return tokens, np.concatenate([[0], np.cumsum(np.maximum(counts, 1))])


def _minhash(tokens: Hashes, offsets: Indices) -> NDArray[np.uint32]:
    try:
        from rensa import RMinHash  # type: ignore[import-untyped]
    except ImportError as error:
        raise WhetError(
            "near duplicates need the package rensa", where="dedup.threshold", fix="pip install rensa"
        ) from error
    parts = []
    for rows in _few(offsets):
        part = offsets[rows.start : rows.stop + 1].astype(np.uint64)
        within = tokens[part[0] : part[-1]]
        parts += RMinHash.digest_matrix_from_flat_token_hashes(within, part - part[0], PLACES, SEED).to_rows()
    values = chain.from_iterable(parts)
    return np.fromiter(values, dtype=np.uint32, count=(len(offsets) - 1) * PLACES).reshape(-1, PLACES)


def _few(offsets: Indices) -> Iterator[range]:
    """Rows in ranges of up to _TOKENS_AT_ONCE tokens, or one row of more."""
    start = 0
    while start < len(offsets) - 1:
        stop = int(np.searchsorted(offsets, offsets[start] + _TOKENS_AT_ONCE, side="right")) - 1
        stop = max(stop, start + 1)
        yield range(start, stop)
        start = stop


def _bands(minhash: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.uint64]:
    """A hash of each band's values, uint64 [N, B]. Places beyond B * r are used in the estimate alone."""
    places = minhash[:, : bands * rows].reshape(len(minhash), bands, rows)
    hashes = np.zeros((len(minhash), bands), np.uint64)
    for row in range(rows):
        hashes = mix(hashes ^ (places[:, :, row] + np.uint64(row + 1 << 32)))
    return hashes


# ---------------------------------------------------------------- clusters


def clusters(signatures: Signatures, threshold: float | None) -> Indices:
    """The cluster of each row, int64 [N]: 0, 1, ... in the order of the clusters' smallest exact hashes.

    The rows' order changes nothing but the order of the labels. Memory beside the signatures: about 100 bytes a row.

    Misses: similar rows that share no band (1 in 100 at the threshold, fewer above), and in a bucket of more than
    WINDOW + 1 rows that many distinct texts of boilerplate fall into, pairs that meet neither as neighbours nor through
    a representative. Such pairs mostly meet in another of their bands.
    """
    distinct, rows = _distinct(signatures.exact)
    root = np.arange(len(rows))
    if threshold is not None and len(rows):
        bands, _ = banding(threshold)
        if signatures.bands.shape[1] != bands:
            raise ValueError(f"signed with {signatures.bands.shape[1]} bands; a threshold of {threshold} has {bands}")
        similar = _similar_to(signatures.minhash, rows, threshold)
        for band in range(bands):
            # The order of equal values decides who meets whom. Distinct texts are in the order of their hashes, and
            # sorts are stable, so it does not depend on the order of the rows.
            values = np.asarray(signatures.bands[:, band])[rows]
            within = np.asarray(signatures.bands[:, (band + 1) % bands])[rows]
            a, b = _pairs(values, within, root, similar)
            root = _unite(root, a, b)
    number = np.cumsum(root == np.arange(len(root))) - 1
    labels: Indices = number[root][distinct]
    return labels


def keepers(labels: Indices, characters: Indices, ids: NDArray[np.uint64]) -> Flags:
    """Which row of each cluster to keep, bool [N]: the longest, of equally long ones that with the smallest id.

    characters: the length of each row's text [N]; ids: [N, W], words from the most significant. Of rows that are equal
    in all of these, the first.
    """
    order = np.lexsort((*reversed(ids.T), -characters.astype(np.int64), labels))
    kept = np.zeros(len(labels), dtype=np.bool_)
    kept[order[_firsts(labels[order])]] = True
    return kept


def _distinct(exact: NDArray[np.uint64]) -> tuple[Indices, Indices]:
    """(number of each row's text [N], a row of each text [U]), the texts in the order of their hashes."""
    order = np.lexsort((exact[:, 1], exact[:, 0]))
    ordered = exact[order]
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.cumsum(first) - 1
    return numbers, order[first]


def _firsts(ordered: NDArray[np.generic]) -> Indices:
    """Where each run of equal values starts."""
    first = np.ones(len(ordered), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    return np.flatnonzero(first)


Similar = Callable[[Indices, Indices], Flags]


def _similar_to(minhash: NDArray[np.uint32], rows: Indices, threshold: float) -> Similar:
    """Whether pairs of distinct texts agree in enough places."""
    needed = int(np.ceil(threshold * minhash.shape[1] - 1e-9))

    def similar(a: Indices, b: Indices) -> Flags:
        result = np.empty(len(a), dtype=np.bool_)
        for i in range(0, len(a), _AT_ONCE):
            part = slice(i, i + _AT_ONCE)
            agreeing = minhash[rows[a[part]]] == minhash[rows[b[part]]]
            result[part] = np.count_nonzero(agreeing, axis=1) >= needed
        return result

    return similar


def _pairs(values: Hashes, within: Hashes, root: Indices, similar: Similar) -> tuple[Indices, Indices]:
    """The similar pairs of one band that are not in one cluster yet."""
    order = _in_buckets(values)
    order = order[np.lexsort((within[order], values[order]))]
    starts = _firsts(values[order])
    sizes = np.diff(np.append(starts, len(order)))
    bucket = np.repeat(np.arange(len(starts)), sizes)
    found: list[tuple[Indices, Indices]] = []
    for distance in range(1, WINDOW + 1):
        near = np.flatnonzero(bucket[distance:] == bucket[:-distance])
        a, b = order[near], order[near + distance]
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]
        alike = similar(a, b)
        found.append((a[alike], b[alike]))
    large = (sizes > WINDOW + 1)[bucket]
    found += _with_representatives(order[large], bucket[large], root, similar)
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _in_buckets(values: Hashes) -> Indices:
    """The items whose value another one has too."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = np.zeros(len(order) + 1, dtype=np.bool_)
    same[1:-1] = ordered[1:] == ordered[:-1]
    return np.sort(order[same[1:] | same[:-1]])


def _with_representatives(
    members: Indices, bucket: Indices, root: Indices, similar: Similar
) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of large buckets. In each round the first member left in a bucket takes out those that are like it."""
    for _ in range(REPRESENTATIVES):
        if not len(members):
            return
        starts = _firsts(bucket)
        sizes = np.diff(np.append(starts, len(members)))
        first = np.repeat(members[starts], sizes)
        settled = root[first] == root[members]
        open_ = np.flatnonzero(~settled)
        alike = open_[similar(first[open_], members[open_])]
        yield first[alike], members[alike]
        settled[alike] = True
        members, bucket = members[~settled], bucket[~settled]


def _unite(root: Indices, a: Indices, b: Indices) -> Indices:
    """Union-find on whole arrays: `root` with the components of each a[i], b[i] made one, named by the smallest."""
    root = root.copy()
    while len(a):
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, further := root[root]):
            root = further
    return root
