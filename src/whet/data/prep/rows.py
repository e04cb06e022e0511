"""Numbers of every row [N], in the order of the chunks: what duplicates, sides and leaks are decided on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.data.prep import chunks
from whet.data.prep.steps import Steps
from whet.data.similar.duplicates import Flags
from whet.data.similar.words import Hashes, Indices
from whet.data.split import hash_of


@dataclass
class Rows:
    """id [N, 2]: two words. chunk: the number of the one that it lies in. characters: of its texts.

    group, stratum: hashes of what the split goes by; without a group, of the row's id. held: out for evaluation, by its
    source or its time.
    """

    id: Hashes
    chunk: NDArray[np.int32]
    characters: Indices
    group: Hashes
    stratum: Hashes
    held: Flags

    def __len__(self) -> int:
        return len(self.chunk)

    def offsets(self, chunks: int) -> Indices:
        """Where each of so many chunks begins, and the number of rows after them."""
        found: Indices = np.searchsorted(self.chunk, np.arange(chunks + 1))
        return found

    @classmethod
    def load(cls, tasks: Sequence[chunks.Task], steps: Steps) -> Rows:
        names = ["id", "characters", "group", "stratum", "held"]
        tables = [chunks.read_columns(task.path("arrow"), names) for task in tasks]
        counts = [table.num_rows for table in tables]

        def column(name: str, kind: Any) -> NDArray[Any]:
            empty = False if kind is np.bool_ else 0
            parts = [table.column(name).combine_chunks().fill_null(empty) for table in tables]
            return np.concatenate([np.empty(0, kind), *(part.to_numpy(zero_copy_only=False) for part in parts)])

        ids = b"".join(b"".join(table.column("id").to_pylist()) for table in tables)
        rows = cls(
            id=np.frombuffer(ids, dtype=">u8").astype(np.uint64).reshape(-1, 2),
            chunk=np.repeat(np.arange(len(tasks), dtype=np.int32), counts),
            characters=column("characters", np.int64),
            group=column("group", np.uint64),
            stratum=column("stratum", np.uint64),
            held=column("held", np.bool_),
        )
        if steps.split.group_by is None:
            rows.group = np.array([hash_of(f"{a:016x}{b:016x}", steps.seed) for a, b in rows.id.tolist()], np.uint64)
        return rows


@dataclass(frozen=True)
class Duplicates:
    """Rows that were dropped, and the row of each one's cluster that stayed; both are numbers of rows."""

    dropped: Indices
    kept: Indices

    @classmethod
    def of(cls, labels: Indices, kept: Flags) -> Duplicates:
        """labels: the cluster of each row [N], in each of which one row is kept."""
        stays = np.zeros(int(labels.max(initial=-1)) + 1, np.int64)
        stays[labels[kept]] = np.flatnonzero(kept)
        dropped = np.flatnonzero(~kept)
        return cls(dropped, stays[labels[dropped]])


def places(chosen: Indices, rows: Rows, tasks: Sequence[chunks.Task]) -> list[str]:
    """file:line of each chosen row."""
    starts = rows.offsets(len(tasks))
    found = np.empty(len(chosen), object)
    for number in np.unique(rows.chunk[chosen]).tolist():
        mine = np.flatnonzero(rows.chunk[chosen] == number)
        table = chunks.read_columns(tasks[number].path("arrow"), ["source", "line"]).take(chosen[mine] - starts[number])
        sources, lines = (table.column(name).to_pylist() for name in ("source", "line"))
        found[mine] = [f"{source}:{line}" for source, line in zip(sources, lines, strict=True)]
    return found.tolist()
