"""Rows that say the same: within the set, and as evaluation rows and tasks say. As whet prep would find them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from whet.data.doctor.findings import Finding, Place, by_share
from whet.data.doctor.rows import Row
from whet.data.prep.signing import COMMON, SAMPLE
from whet.data.similar.duplicates import Signatures, clusters, common_shingles, sign
from whet.data.similar.leaks import KINDS, Kind, LeakIndex, Matches, Role, near_leaks
from whet.data.similar.tasks import TaskText

THRESHOLD = 0.85
"""Estimated Jaccard similarity from which rows count as one."""

MANY = 0.01
"""Share of the rows from which duplicates are more than a note."""

HOW: dict[Kind, str] = {"exact": "say the same as", "near": "say nearly the same as", "ngram": "hold text of"}

Labels = NDArray[np.int64]


def find_repeats(rows: Sequence[Row], heldout: Sequence[Row], tasks: Sequence[TaskText]) -> Iterator[Finding]:
    """Duplicates among the training rows, and the leaks of evaluation rows and of tasks' questions into them."""
    said = [row.said for row in (*rows, *heldout)] + [task.text for task in tasks]
    sample = sorted({row.example.id: row.said for row in rows}.items())[:SAMPLE]
    common = common_shingles([text for _, text in sample], COMMON)
    signatures = sign(said, THRESHOLD, common)
    near = clusters(signatures, THRESHOLD)
    yield from _duplicates(rows, _exact_labels(signatures)[: len(rows)], near[: len(rows)])
    if heldout or tasks:
        yield from _leaks(rows, heldout, tasks, near)


def _exact_labels(signatures: Signatures) -> Labels:
    return np.unique(signatures.exact, axis=0, return_inverse=True)[1].reshape(-1)


def _duplicates(rows: Sequence[Row], exact: Labels, near: Labels) -> Iterator[Finding]:
    again = _first_alike(exact)
    if again:
        yield Finding(
            "exact duplicates",
            by_share(len(again), len(rows), warning=MANY),
            _places(rows, again),
            "Rows that say what an earlier row says. The model learns them by heart and repeats them.",
            "Keep one of each; whet prep does (data.dedup).",
        )
    alike = {i: first for i, first in _first_alike(near).items() if i not in again}
    if alike:
        yield Finding(
            "near duplicates",
            by_share(len(alike), len(rows), warning=MANY),
            _places(rows, alike),
            f"Rows that share some {THRESHOLD:.0%} of their five-word runs with an earlier row.",
            f"Look at some. If they are copies with small changes, keep one of each: dedup: {{near: {THRESHOLD}}}.",
        )


def _first_alike(labels: Labels) -> dict[int, int]:
    """Row -> the first row with its label, for every row that is not the first."""
    _, first, number = np.unique(labels, return_index=True, return_inverse=True)
    owner = first[number.reshape(-1)].tolist()
    return {i: j for i, j in enumerate(owner) if i != j}


def _leaks(rows: Sequence[Row], heldout: Sequence[Row], tasks: Sequence[TaskText], near: Labels) -> Iterator[Finding]:
    found = _all_leaks(rows, heldout, tasks, near)
    sources = [row.where for row in heldout] + [task.where for task in tasks]
    told: set[int] = set()
    for kind in KINDS:  # each row is told once, by the plainest kind
        of_kind = found.kind == KINDS.index(kind)
        pairs: dict[int, int] = {}
        for row, text in zip(found.row[of_kind].tolist(), found.text[of_kind].tolist(), strict=True):
            if row not in told:
                pairs.setdefault(row, text)
        told.update(pairs)
        if pairs:
            yield Finding(
                f"leaks ({'13-gram' if kind == 'ngram' else kind})",
                "error",
                tuple(rows[i].place(rows[i].said, detail=f"as {sources[j]}") for i, j in pairs.items()),
                f"Training rows that {HOW[kind]} an evaluation row or a task. Scores on it then measure memory.",
                "Drop these training rows (whet prep, leaks: {gate: drop}), or split by what they share (group_by).",
            )


def _all_leaks(rows: Sequence[Row], heldout: Sequence[Row], tasks: Sequence[TaskText], near: Labels) -> Matches:
    """row: numbers of training rows. text: of held-out rows, and of tasks after them."""
    roles: list[Role] = ["row" for _ in heldout]
    roles += [task.role for task in tasks]
    index = LeakIndex.build([*(row.said for row in heldout), *(task.text for task in tasks)], roles)
    training = np.arange(len(near)) < len(rows)
    alike = near_leaks(near, training, ~training)
    alike = Matches(alike.row, alike.text - len(rows), alike.kind)
    parts = [row.parts for row in rows]
    return Matches.merged([index.live(index.count(parts)).find(parts), alike])


def _places(rows: Sequence[Row], pairs: dict[int, int]) -> tuple[Place, ...]:
    return tuple(rows[i].place(rows[i].said, detail=f"as {rows[j].where}") for i, j in pairs.items())
