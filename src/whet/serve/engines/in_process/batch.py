"""A step's parts as the tensors of one forward pass.

The order in the packed row: by adapter, then by number of new tokens, then by length, so that each adapter's tokens are
one slice and sequences that attend together are neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from whet.serve.engines.in_process.adapters import Adapter, Segment
from whet.serve.engines.in_process.attention import Group, Pages, Step
from whet.serve.engines.in_process.pages import PAGE, PageTable, pages_for
from whet.serve.engines.in_process.scheduler import Part

SHORT = 8
"""Pages: sequences up to this long attend together; beyond, those whose lengths differ by less than twice."""


@dataclass(frozen=True)
class Batch:
    """token_ids, positions: [1, T]. rows: the places in the packed row that get logits. parts: in the row's order."""

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    step: Step
    segments: tuple[Segment, ...]
    parts: tuple[Part, ...]


def pack(parts: Many[Part], table: PageTable, layers: dict[int, Pages], device: torch.device) -> Batch:
    parts = sorted(parts, key=_order)
    ids: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    groups: list[Group] = []
    for _, members in itertools.groupby(parts, key=_order):
        together = list(members)
        first, L = len(ids), together[0].count
        for part in together:
            computed = part.sequence.computed
            ids.extend(part.sequence.tokens[computed : computed + L])
        rows = np.array([part.sequence.row for part in together])
        at_BL = np.array([part.sequence.computed for part in together])[:, None] + np.arange(L)
        slots.append((table.table[rows[:, None], at_BL // PAGE] * PAGE + at_BL % PAGE).ravel())
        positions.append(at_BL.ravel())
        P = pages_for(int(at_BL.max()) + 1)
        groups.append(Group(first, _to(table.table[rows, :P], device), _to(at_BL, device), PAGE))
    step = Step(layers, _to(np.concatenate(slots), device), tuple(groups))
    ends = list(itertools.accumulate(part.count for part in parts))
    rows_with_logits = [end - 1 for part, end in zip(parts, ends, strict=True) if part.gets_token]
    return Batch(
        torch.tensor([ids], device=device),
        _to(np.concatenate(positions)[None], device),
        torch.tensor(rows_with_logits or [0], device=device),
        step,
        _segments(parts),
        tuple(parts),
    )


def _order(part: Part) -> tuple[int, int, int]:
    """Parts that compare equal attend together."""
    pages = pages_for(part.sequence.computed + part.count)
    adapter = part.sequence.adapter
    return (0 if adapter is None else id(adapter), part.count, max(pages, SHORT).bit_length() if pages > SHORT else 0)


def _segments(parts: Many[Part]) -> tuple[Segment, ...]:
    segments, token, row = [], 0, 0
    for adapter, members in itertools.groupby(parts, key=lambda part: part.sequence.adapter):
        together = list(members)
        tokens, rows = sum(part.count for part in together), sum(part.gets_token for part in together)
        if isinstance(adapter, Adapter):
            segments.append(Segment(adapter, (token, token + tokens), (row, row + rows)))
        token, row = token + tokens, row + rows
    return tuple(segments)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
