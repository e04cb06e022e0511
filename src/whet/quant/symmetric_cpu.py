"""The search of `symmetric`, compiled: the same sums in the same order, so the same bytes. See `tiles`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whet.quant.grids import CODEBOOK, MOST_SCALE, SMALLEST_COVER, Symmetric
from whet.quant.tiles import FAR, LANES, ONE, TWO, ZERO, Bytes, Floats, find_range, helper, invert, jit, load
from whet.quant.tiles import scale_by as _scale_by
from whet.quant.tiles import weigh as _weigh

_COVER, _MOST = np.float32(SMALLEST_COVER), np.float32(MOST_SCALE)
_LEVELS = np.array(CODEBOOK, np.float32)


def symmetric_search(x_BN: Tensor, h_PN: Tensor | None, grid: Symmetric) -> Tensor:
    """As `symmetric.symmetric_search`, on the CPU."""
    scale = np.empty(x_BN.shape[0], np.float32)
    trials, weighing = grid.search(h_PN is not None)
    settings = _range(grid), grid.codebook, np.array(trials, np.float32), grid.polish
    _search(x_BN.numpy(), _importance(h_PN), int(weighing), *settings, scale)
    return torch.from_numpy(scale)


def symmetric_levels(
    x_BN: Tensor, h_PN: Tensor | None, grid: Symmetric, d: Tensor, sc: Tensor
) -> tuple[Tensor, Tensor]:
    """As `symmetric.symmetric_levels`, on the CPU."""
    multiples, codes = sc.numpy().copy(), np.empty(x_BN.shape, np.uint8)
    settings = int(grid.search(h_PN is not None)[1]), _range(grid), grid.codebook, np.array(grid.steps, np.float32)
    _find_codes(x_BN.numpy(), _importance(h_PN), *settings, d.numpy(), multiples, codes)
    return torch.from_numpy(multiples), torch.from_numpy(codes)


def _importance(h_PN: Tensor | None) -> Floats:
    return np.empty((0, 0), np.float32) if h_PN is None else h_PN.numpy()


def _range(grid: Symmetric) -> Floats:
    return np.array([grid.low, grid.high, grid.unit_low, grid.unit_high], np.float32)


@jit
def _nearest(v: np.float32) -> np.float32:
    """The codebook's level nearest to v, the lower of two: its lowest, and what each middle passed adds."""
    level: np.float32 = _LEVELS[0]
    level += _LEVELS[1] - _LEVELS[0] if v > np.float32(-115.5) else ZERO
    level += _LEVELS[2] - _LEVELS[1] if v > np.float32(-93.5) else ZERO
    level += _LEVELS[3] - _LEVELS[2] if v > np.float32(-74.0) else ZERO
    level += _LEVELS[4] - _LEVELS[3] if v > np.float32(-57.0) else ZERO
    level += _LEVELS[5] - _LEVELS[4] if v > np.float32(-42.0) else ZERO
    level += _LEVELS[6] - _LEVELS[5] if v > np.float32(-28.5) else ZERO
    level += _LEVELS[7] - _LEVELS[6] if v > np.float32(-16.0) else ZERO
    level += _LEVELS[8] - _LEVELS[7] if v > np.float32(-4.5) else ZERO
    level += _LEVELS[9] - _LEVELS[8] if v > np.float32(7.0) else ZERO
    level += _LEVELS[10] - _LEVELS[9] if v > np.float32(19.0) else ZERO
    level += _LEVELS[11] - _LEVELS[10] if v > np.float32(31.5) else ZERO
    level += _LEVELS[12] - _LEVELS[11] if v > np.float32(45.5) else ZERO
    level += _LEVELS[13] - _LEVELS[12] if v > np.float32(61.0) else ZERO
    level += _LEVELS[14] - _LEVELS[13] if v > np.float32(79.0) else ZERO
    level += _LEVELS[15] - _LEVELS[14] if v > np.float32(101.0) else ZERO
    return level


@helper
def _levels(u: Floats, inverse: Floats, ends: Floats, codebook: bool, out: Floats) -> None:
    """The level of each weight, for the scale 1 / inverse. `out` may be `u`."""
    low, high = ends[0], ends[1]
    for i in range(u.shape[0]):
        if codebook:
            for lane in range(LANES):
                out[i, lane] = _nearest(u[i, lane] * inverse[lane])
        else:
            for lane in range(LANES):
                out[i, lane] = min(max(np.rint(u[i, lane] * inverse[lane]), low), high)


@helper
def _moments(u: Floats, w: Floats, wu: Floats, inverse: Floats, ends: Floats, codebook: bool, s: Floats) -> None:
    """s [2, LANES]: sums of w u level and w level^2, for the levels of the scale 1 / inverse."""
    low, high = ends[0], ends[1]
    s[:] = ZERO
    for i in range(u.shape[0]):
        if codebook:
            for lane in range(LANES):
                level = _nearest(u[i, lane] * inverse[lane])
                s[0, lane] += wu[i, lane] * level
                s[1, lane] += w[i, lane] * level * level
        else:
            for lane in range(LANES):
                level = min(max(np.rint(u[i, lane] * inverse[lane]), low), high)
                s[0, lane] += wu[i, lane] * level
                s[1, lane] += w[i, lane] * level * level


@helper
def _fit(s: Floats, low: np.float32, best: Floats) -> None:
    """best [2, LANES]: scale and its gain; replaced where the least-squares scale for these sums gains more."""
    for lane in range(LANES):
        a = s[0, lane] / s[1, lane] if s[1, lane] > ZERO else ZERO
        gain = a * s[0, lane]
        reach = abs(a) * -low
        better = (reach >= _COVER) & (reach <= _MOST) & (gain > best[1, lane])
        best[0, lane] = a if better else best[0, lane]
        best[1, lane] = gain if better else best[1, lane]


@helper
def _load_relative(x: Floats, first: int, u: Floats, extreme: Floats, inverse: Floats) -> int:
    """Load a tile of x; extreme: each block's weight of largest magnitude, the positive one of two; inverse: 1 over."""
    count = load(x, first, u)
    find_range(u, inverse, extreme)
    for lane in range(LANES):
        extreme[lane] = extreme[lane] if extreme[lane] >= -inverse[lane] else inverse[lane]
    invert(extreme, inverse)
    return count


@jit
def _search(
    x: Floats, h: Floats, weighing: int, ends: Floats, codebook: bool, trials: Floats, polish: int, scale: Floats
) -> None:
    tiles = np.empty((3, x.shape[1], LANES), np.float32)
    u, w, wu = tiles[0], tiles[1], tiles[2]
    rows = np.empty((3, LANES), np.float32)
    extreme, inverse, row = rows[0], rows[1], rows[2]
    sums = np.empty((4, LANES), np.float32)
    s, best = sums[:2], sums[2:]
    for first in range(0, x.shape[0], LANES):
        count = _load_relative(x, first, u, extreme, inverse)
        _weigh(u, inverse, h, first, weighing, w, row)
        _scale_by(u, inverse)
        for i in range(u.shape[0]):
            for lane in range(LANES):
                wu[i, lane] = w[i, lane] * u[i, lane]
        for trial in range(trials.shape[0] + polish):
            for lane in range(LANES):
                inverse[lane] = trials[trial] if trial < trials.shape[0] else ONE / best[0, lane]
            _moments(u, w, wu, inverse, ends, codebook, s)
            if trial == 0:
                a = ONE / trials[0]
                for lane in range(LANES):
                    best[0, lane] = a
                    best[1, lane] = a * (TWO * s[0, lane] - a * s[1, lane])
            _fit(s, ends[0], best)
        for lane in range(count):
            scale[first + lane] = best[0, lane] * extreme[lane]


@helper
def _try_steps(
    u: Floats, w: Floats, ends: Floats, codebook: bool, steps: Floats, unit: Floats, best: Floats, level: Floats
) -> None:
    """Put the best of the neighbours of `best` [LANES], the multiple of the unit, in its place."""
    start = best.copy()
    rows = np.empty((5, LANES), np.float32)
    tried, a, inverse, loss, least = rows[0], rows[1], rows[2], rows[3], rows[4]
    least[:] = FAR
    for step in steps:
        for lane in range(LANES):
            tried[lane] = min(max(start[lane] + step, ends[2]), ends[3])
            a[lane] = unit[lane] * tried[lane]
        invert(a, inverse)
        _levels(u, inverse, ends, codebook, level)
        loss[:] = ZERO
        for i in range(u.shape[0]):
            for lane in range(LANES):
                error = a[lane] * level[i, lane] - u[i, lane]
                loss[lane] += w[i, lane] * (error * error)
        for lane in range(LANES):
            better = loss[lane] < least[lane]
            best[lane] = tried[lane] if better else best[lane]
            least[lane] = loss[lane] if better else least[lane]


@jit
def _find_codes(
    x: Floats,
    h: Floats,
    weighing: int,
    ends: Floats,
    codebook: bool,
    steps: Floats,
    d: Floats,
    multiples: Floats,
    codes: Bytes,
) -> None:
    n = x.shape[1]
    tiles = np.empty((3, n, LANES), np.float32)
    u, w, level = tiles[0], tiles[1], tiles[2]
    rows = np.empty((3, LANES), np.float32)
    extreme, inverse, row = rows[0], rows[1], rows[2]
    unit, best = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for first in range(0, x.shape[0], LANES):
        count = _load_relative(x, first, u, extreme, inverse)
        if steps.shape[0] > 1:
            _weigh(u, inverse, h, first, weighing, w, row)
        _scale_by(u, inverse)
        for lane in range(count):
            unit[lane] = d[first + lane] * inverse[lane]
            best[lane] = multiples[first + lane]
        if steps.shape[0] > 1:
            _try_steps(u, w, ends, codebook, steps, unit, best, level)
        for lane in range(LANES):
            row[lane] = unit[lane] * best[lane]
        invert(row, inverse)
        _levels(u, inverse, ends, codebook, level)
        for lane in range(count):
            multiples[first + lane] = best[lane]
            for i in range(n):
                codes[first + lane, i] = _code(level[i, lane], ends[0], codebook)


@helper
def _code(level: np.float32, low: np.float32, codebook: bool) -> np.uint8:
    """How many levels lie below this one."""
    if not codebook:
        return np.uint8(level - low)
    below = 0
    for other in _LEVELS:
        below += other < level
    return np.uint8(below)
