"""What the compiled searches share: blocks on a tile of 64 at a time, transposed, and the weight of each error.

A tile is [N, LANES], so that every loop over lanes becomes vector instructions while each block's sums still run from
its first weight to its last: any processor gives the same bytes, and `affine` and `symmetric` in torch give them too.
No multiplication is fused with an addition, for the same reason. What a block has one of is [LANES].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from whet.quant.grids import NEGLIGIBLE, Weighing

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
_F = TypeVar("_F", bound=Callable[..., Any])


def jit_with(**options: Any) -> Callable[[_F], _F]:
    """Compile a function when it is first called, which takes seconds; it releases the GIL.

    The model "numpy" divides by zero to infinity, where Python's would put a branch into every loop.
    """
    return cast(Callable[[_F], _F], numba.njit(nogil=True, error_model="numpy", **options))


# For what Python calls, and for what only other compiled functions call; a wrapper takes a tenth of a second.
jit = jit_with(no_cfunc_wrapper=True)
helper = jit_with(no_cfunc_wrapper=True, no_cpython_wrapper=True)
LANES = 64
# Python's own numbers would widen the arithmetic to float64.
ZERO, ONE, TWO, FAR = np.float32(0), np.float32(1), np.float32(2), np.float32(1e30)
TINY = np.float32(NEGLIGIBLE)
_SUM, _IMPORTANCE, _SMOOTHED = int(Weighing.SUM), int(Weighing.IMPORTANCE), int(Weighing.SMOOTHED)


@helper
def load(x: Floats, first: int, tile: Floats) -> int:
    """Transpose blocks first, first + 1, ... of x [B, N] into the tile, zeros beyond the last; how many there were."""
    count: int = min(LANES, x.shape[0] - first)
    for lane in range(LANES):
        for i in range(x.shape[1]):
            tile[i, lane] = x[first + lane, i] if lane < count else ZERO
    return count


@helper
def find_range(tile: Floats, low: Floats, high: Floats) -> None:
    """The least and the greatest weight of each block."""
    for lane in range(LANES):
        low[lane] = tile[0, lane]
        high[lane] = tile[0, lane]
    for i in range(1, tile.shape[0]):
        for lane in range(LANES):
            low[lane] = min(low[lane], tile[i, lane])
            high[lane] = max(high[lane], tile[i, lane])


@helper
def invert(x: Floats, out: Floats) -> None:
    """1 / x, and 0 where |x| is negligible. `out` may be `x`."""
    for lane in range(LANES):
        out[lane] = ONE / x[lane] if abs(x[lane]) > TINY else ZERO


@helper
def scale_by(tile: Floats, factor: Floats) -> None:
    """Multiply each block by its factor."""
    for i in range(tile.shape[0]):
        for lane in range(LANES):
            tile[i, lane] *= factor[lane]


@helper
def weigh(tile: Floats, inverse: Floats, h: Floats, first: int, weighing: int, w: Floats, row: Floats) -> None:
    """Write to w how much each error counts. u = tile * inverse is x relative to the block's largest magnitude.

    h [P, N]: importance of a row's P blocks. row: scratch.
    """
    if weighing in (_SUM, _SMOOTHED):
        _mean_square(tile, inverse, row)
    else:
        row[:] = ZERO
    if weighing < _IMPORTANCE:
        for lane in range(LANES):
            row[lane] = np.sqrt(row[lane])
        for i in range(tile.shape[0]):
            for lane in range(LANES):
                w[i, lane] = abs(tile[i, lane] * inverse[lane]) + row[lane]
        return
    _load_importance(h, first, w)
    if weighing == _SMOOTHED:
        for i in range(tile.shape[0]):
            for lane in range(LANES):
                u = tile[i, lane] * inverse[lane]
                w[i, lane] *= np.sqrt(row[lane] + u * u)


@helper
def _mean_square(tile: Floats, inverse: Floats, out: Floats) -> None:
    share = ONE / np.float32(tile.shape[0])
    out[:] = ZERO
    for i in range(tile.shape[0]):
        for lane in range(LANES):
            u = tile[i, lane] * inverse[lane]
            out[lane] += u * u
    for lane in range(LANES):
        out[lane] *= share


@helper
def _load_importance(h: Floats, first: int, w: Floats) -> None:
    """The importance of each weight relative to its block's greatest; ones where the whole block has none."""
    for lane in range(LANES):
        block = (first + lane) % h.shape[0]
        largest = ZERO
        for i in range(w.shape[0]):
            largest = max(largest, h[block, i])
        for i in range(w.shape[0]):
            w[i, lane] = h[block, i] / largest if largest > ZERO else ONE
