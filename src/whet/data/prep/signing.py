"""Signatures of every chunk's rows, kept in files beside it, and the clusters that they make.

Phrases that many rows share (an instruction, a signature) would make strangers near-duplicates, so they do not count:
those that lie in more than COMMON of a sample. The sample is the rows with the smallest ids, which no order of files
can change.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.data.examples import Example, spoken
from whet.data.prep import chunks
from whet.data.prep.steps import digest_of
from whet.data.similar.duplicates import PLACES, Signatures, clusters, common_shingles, sign
from whet.data.similar.words import Hashes, Indices
from whet.files import whole_file

VERSION = 1
SAMPLE = 4096
COMMON = 0.05
BATCH = 2048


@dataclass
class Signed:
    """Signatures of all rows, in the order of the chunks. Files: exact and bands, minhash."""

    threshold: float
    words: list[Path]
    minhash: list[Path]
    common: Hashes
    joined: Path

    def labels(self, also: Sequence[str] = ()) -> Indices:
        """[N] the cluster of near-duplicates that each row is in; the texts `also` are rows after the last."""
        return clusters(self._with(also), self.threshold) if also else self._labels

    @cached_property
    def _labels(self) -> Indices:
        return clusters(self._signatures(), self.threshold)

    def _with(self, texts: Sequence[str]) -> Signatures:
        return Signatures.concatenate([self._signatures(), sign(texts, self.threshold, self.common)])

    def _signatures(self) -> Signatures:
        """Not kept. minhash, the largest by far, lies in a file, of which memory holds what is being compared."""
        words = np.concatenate([np.load(path, allow_pickle=False) for path in self.words])
        minhash = np.lib.format.open_memmap(self.joined, "w+", np.uint32, (len(words), PLACES))
        start = 0
        for path in self.minhash:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
            minhash[start : start + len(part)] = part
            start += len(part)
        return Signatures(words[:, :2], words[:, 2:], minhash)


@dataclass(frozen=True)
class Task:
    path: str  # of the chunk
    words: str
    minhash: str
    threshold: float
    common: NDArray[np.uint64] = field(repr=False)


def sign_chunks(
    tasks: Sequence[chunks.Task], threshold: float, each: Callable[[Callable[[Task], None], list[Task]], Any]
) -> Signed:
    """threshold: the similarity from which rows are near-duplicates. each: runs a function on all items."""
    common = common_shingles(_sample(tasks), COMMON)
    mark = digest_of([VERSION, threshold, common.tolist()])[:16]
    work = [
        Task(
            path=str(task.path("arrow")),
            words=str(task.path(f"{mark}.words.npy")),
            minhash=str(task.path(f"{mark}.minhash.npy")),
            threshold=threshold,
            common=common,
        )
        for task in tasks
    ]
    each(sign_chunk, work)
    words, minhash = [Path(task.words) for task in work], [Path(task.minhash) for task in work]
    return Signed(threshold, words, minhash, common, Path(tasks[0].folder) / "minhash.npy")


def sign_chunk(task: Task) -> None:
    if os.path.exists(task.minhash):
        return
    examples = chunks.examples_of(Path(task.path))
    parts = []
    while batch := [text_of(example) for example in islice(examples, BATCH)]:
        parts.append(sign(batch, task.threshold, task.common))
    parts = parts or [sign([], task.threshold, task.common)]
    _save(task.words, np.concatenate([np.hstack([part.exact, part.bands]) for part in parts]))
    _save(task.minhash, np.concatenate([part.minhash for part in parts]))


def text_of(example: Example) -> str:
    return "\n".join(spoken(example))


def _sample(tasks: Sequence[chunks.Task]) -> list[str]:
    """What the rows with the smallest ids say."""
    smallest: list[tuple[bytes, str]] = []
    for task in tasks:
        table = chunks.read_rows_of(task.path("arrow"), 0, SAMPLE).select(["id", "content"])
        found = zip(table.column("id").to_pylist(), table.column("content").to_pylist(), strict=True)
        smallest = sorted({*smallest, *found})[:SAMPLE]
    return [text_of(chunks.example_in(content)) for _, content in smallest]


def _save(path: str, array: NDArray[Any]) -> None:
    with whole_file(Path(path)) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
