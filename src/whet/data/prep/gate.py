"""The leak gate over all chunks: which training rows hold text of held-out rows or of evaluation tasks (leaks.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.examples import spoken
from whet.data.prep import chunks
from whet.data.prep.signing import Signed
from whet.data.similar.duplicates import Flags
from whet.data.similar.leaks import KINDS, Counts, Leak, LeakIndex, Matches, Role, faults_of, near_leaks
from whet.data.similar.tasks import TaskText
from whet.data.similar.words import Indices
from whet.errors import WhetError

BATCH = 1024

Each = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Runs a function on all items and tells progress: step, function, items."""


@dataclass(frozen=True)
class Gate:
    """What the leaks of all chunks are found with. offsets: where each chunk's rows begin, and their number."""

    tasks: Sequence[chunks.Task]
    offsets: Indices
    signed: Signed
    evaluation: Sequence[TaskText]
    folder: Path
    each: Each

    def find(self, training: Flags, held: Flags) -> Found:
        """training, held: the rows [N] of each side."""
        parts = [
            _Part(str(task.path("arrow")), str(self.folder), int(start), np.flatnonzero(training[start:stop]))
            for task, start, stop in self._slices()
        ]
        try:
            self._share(self._index(held))
            counts = self.each("leaks", _count, parts)
            self._share(LeakIndex.load(self.folder).live(Counts.merged(counts)))
            # Only rows that have some window of a held-out text can leak one.
            touched = [replace(part, rows=count.touched) for part, count in zip(parts, counts, strict=True)]
            leaks = Matches.merged(self.each("leaks", _find, touched))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return Found(self, leaks, self._near(training, held), np.flatnonzero(held))

    def _slices(self) -> Iterator[tuple[chunks.Task, int, int]]:
        """Each chunk, and its rows among all."""
        return zip(self.tasks, self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)

    def _index(self, held: Flags) -> LeakIndex:
        """Of what held-out rows say, and the evaluation's tasks after them."""
        said = [
            "\n".join(spoken(example))
            for task, start, stop in self._slices()
            for example in chunks.examples_of(task.path("arrow"), np.flatnonzero(held[start:stop]))
        ]
        roles: list[Role] = ["row" for _ in said]
        roles += [task.role for task in self.evaluation]
        return LeakIndex.build([*said, *(task.text for task in self.evaluation)], roles)

    def _share(self, index: LeakIndex) -> None:
        """Where every worker finds it."""
        staged = self.folder.with_name(f"{self.folder.name}.new")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        index.save(staged)
        shutil.rmtree(self.folder, ignore_errors=True)
        staged.rename(self.folder)

    def _near(self, training: Flags, held: Flags) -> Matches:
        """Texts are rows here, and evaluation tasks after them."""
        labels = self.signed.labels([task.text for task in self.evaluation])
        more = np.zeros(len(labels) - len(training), np.bool_)
        return near_leaks(labels, np.concatenate([training, more]), np.concatenate([held, ~more]))


@dataclass(frozen=True)
class Found:
    """leaks: texts are numbers of held-out rows among themselves, and tasks after them. near: see Gate._near."""

    gate: Gate
    leaks: Matches
    near: Matches
    held_rows: Indices

    @property
    def rows(self) -> Flags:
        """The training rows that leak [N]."""
        found = np.zeros(len(self), np.bool_)
        found[self.leaks.row] = found[self.near.row] = True
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Rows by the first of the kinds that they leak by."""
        return {str(kind): rows for kind, rows in Matches.merged([self.leaks, self.near]).counts().items()}

    def faults(self) -> list[WhetError]:
        """Which rows hold text of which, as far as there is room."""
        rows = len(self.held_rows)
        texts = np.where(
            self.leaks.text < rows, _at(self.held_rows, self.leaks.text), len(self) + self.leaks.text - rows
        )
        both = Matches.merged([Matches.of(self.leaks.row, texts, self.leaks.kind), self.near])
        first = np.unique(both.row, return_index=True)[1]
        shown = [
            Leak(self._where(int(both.row[i])), self._where(int(both.text[i])), KINDS[both.kind[i]]) for i in first[:20]
        ]
        return faults_of(shown, rows=len(first))

    def __len__(self) -> int:
        return int(self.gate.offsets[-1])

    def _where(self, row: int) -> str:
        if row >= len(self):
            return self.gate.evaluation[row - len(self)].where
        chunk = int(np.searchsorted(self.gate.offsets, row, side="right")) - 1
        (example,) = chunks.examples_of(
            self.gate.tasks[chunk].path("arrow"), np.array([row - int(self.gate.offsets[chunk])], np.int64)
        )
        return example.where


def _at(values: Indices, places: Indices) -> Indices:
    """values[places], of places that may lie behind the end."""
    return values[np.minimum(places, len(values) - 1)] if len(values) else np.zeros(len(places), np.int64)


# ------------------------------------------------------------------ one chunk, in a worker


@dataclass(frozen=True)
class _Part:
    """Training rows of a chunk: `rows` of its file; the chunk's first row is the set's row `first`."""

    path: str
    index: str
    first: int
    rows: Indices = field(repr=False)

    def batches(self) -> Iterator[tuple[Indices, list[list[str]]]]:
        """(numbers of rows in the chunk, what they say)."""
        examples = chunks.examples_of(Path(self.path), self.rows)
        start = 0
        while batch := [spoken(example) for example in islice(examples, BATCH)]:
            yield self.rows[start : start + len(batch)], batch
            start += len(batch)


def _count(part: _Part) -> Counts:
    """Its `touched` are rows of the chunk."""
    index = LeakIndex.load(Path(part.index))
    found = [(rows, index.count(batch)) for rows, batch in part.batches()]
    return Counts.merged([replace(counts, touched=rows[counts.touched]) for rows, counts in found])


def _find(part: _Part) -> Matches:
    index = LeakIndex.load(Path(part.index))
    found = [(rows + part.first, index.find(batch)) for rows, batch in part.batches()]
    return Matches.merged([Matches.of(rows[leaks.row], leaks.text, leaks.kind) for rows, leaks in found])
