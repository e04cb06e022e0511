"""Where keys and values lie: a fixed store of pages, handed out to sequences as they grow.

A page holds the keys and values of PAGE tokens in every layer. All memory is taken once, at the start, so that it can
neither creep nor break into pieces; a sequence holds what it has filled, rounded up to a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whet.serve.engines.in_process.attention import Pages, Shape

PAGE = 16
"""Tokens. Small pages waste little at a sequence's end; larger ones are read a little faster."""


@dataclass(frozen=True)
class Capacity:
    """pages in all; rows: sequences at once; context: tokens of the longest sequence."""

    pages: int
    rows: int
    context: int


def capacity(bytes_a_token: int, budget: int, rows: int, context: int) -> Capacity:
    """What `budget` bytes hold: at most `rows` sequences of `context` tokens. The context shrinks to fit the budget."""
    wanted = rows * pages_for(context)
    pages = min(wanted, budget // (bytes_a_token * PAGE))
    return Capacity(pages, rows, min(context, pages * PAGE))


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


class PageTable:
    """Which pages each row (a running sequence's place) holds. Pages are interchangeable: the last freed goes first."""

    def __init__(self, size: Capacity):
        self.size = size
        self.table: npt.NDArray[np.int64] = np.zeros((size.rows, pages_for(size.context)), dtype=np.int64)
        self.held = [0] * size.rows
        self._free_pages = list(range(size.pages))
        self._free_rows = list(range(size.rows))

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    def take_row(self) -> int:
        return self._free_rows.pop()

    def grow(self, row: int, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False, and nothing taken, where too few pages are left."""
        held, wanted = self.held[row], pages_for(tokens)
        if wanted - held > len(self._free_pages):
            return False
        for i in range(held, wanted):
            self.table[row, i] = self._free_pages.pop()
        self.held[row] = max(held, wanted)
        return True

    def give_back(self, row: int) -> None:
        """Free a row and its pages."""
        self._free_pages.extend(self.table[row, : self.held[row]].tolist())
        self.held[row] = 0
        self._free_rows.append(row)


def allocate(shapes: dict[int, Shape], pages: int, device: torch.device) -> dict[int, Pages]:
    """The store, by layer. Zeroed: a page's unwritten places are masked out, but must hold numbers."""
    return {
        layer: Pages(
            _zeros((pages, PAGE, shape.heads, shape.key_width), shape.dtype, device),
            _zeros((pages, PAGE, shape.heads, shape.value_width), shape.dtype, device),
        )
        for layer, shape in shapes.items()
    }


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU memory that the system zeroes when it is first written to; torch would write all of it now."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(size)
