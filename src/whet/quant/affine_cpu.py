"""The search of `affine`, compiled: the same sums in the same order, so the same bytes. See `tiles`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from whet.quant.grids import MOST_SCALE, SMALLEST_COVER, Affine
from whet.quant.tiles import FAR, LANES, ONE, TINY, TWO, ZERO, Bytes, Floats, find_range, helper, invert, jit, load
from whet.quant.tiles import scale_by as _scale_by
from whet.quant.tiles import weigh as _weigh

_COVER, _MOST = np.float32(SMALLEST_COVER), np.float32(MOST_SCALE)


def affine_search(x_BN: Tensor, h_PN: Tensor | None, grid: Affine) -> tuple[Tensor, Tensor]:
    """As `affine.affine_search`, on the CPU."""
    scale, offset = np.empty(x_BN.shape[0], np.float32), np.empty(x_BN.shape[0], np.float32)
    trials, weighing = grid.search(h_PN is not None)
    settings = np.float32(grid.top), np.array((0, *trials), np.float32), grid.polish, grid.below_zero
    _search(x_BN.numpy(), _importance(h_PN), int(weighing), *settings, scale, offset)
    return torch.from_numpy(scale), torch.from_numpy(offset)


def affine_levels(
    x_BN: Tensor, h_PN: Tensor | None, grid: Affine, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `affine.affine_levels`, on the CPU."""
    units, multiples = torch.stack([d, dmin]).numpy(), torch.stack([sc, m]).numpy()
    q = np.empty(x_BN.shape, np.uint8)
    weighing = int(grid.search(h_PN is not None)[1])
    tops, steps = np.array([grid.top, grid.unit_top], np.float32), np.array(grid.steps, np.float32)
    _find_levels(x_BN.numpy(), _importance(h_PN), weighing, tops, steps, units, multiples, q)
    return torch.from_numpy(multiples[0]), torch.from_numpy(multiples[1]), torch.from_numpy(q)


def _importance(h_PN: Tensor | None) -> Floats:
    return np.empty((0, 0), np.float32) if h_PN is None else h_PN.numpy()


@helper
def _moments(u: Floats, w: Floats, wu: Floats, offset: Floats, inverse: Floats, top: np.float32, s: Floats) -> None:
    """s [3, LANES]: sums of w q, w q^2 and w u q, for the q that (u - offset) * inverse rounds to."""
    s[:] = ZERO
    for i in range(u.shape[0]):
        for lane in range(LANES):
            q = min(max(np.rint((u[i, lane] - offset[lane]) * inverse[lane]), ZERO), top)
            wq = w[i, lane] * q
            s[0, lane] += wq
            s[1, lane] += wq * q
            s[2, lane] += wu[i, lane] * q


@helper
def _fit(s: Floats, sums: Floats, top: np.float32, best: Floats) -> None:
    """The best scale and offset for a q with these moments; kept where they beat what is there.

    sums [3, LANES]: sums of w and of w u, and the largest offset allowed. best [3, LANES]: scale, offset and loss.
    """
    for lane in range(LANES):
        sum_q, sum_qq, sum_uq = s[0, lane], s[1, lane], s[2, lane]
        sum_w, sum_u, most = sums[0, lane], sums[1, lane], sums[2, lane]
        det = sum_w * sum_qq - sum_q * sum_q
        inverse = ONE / det if det > ZERO else ZERO
        a = (sum_w * sum_uq - sum_u * sum_q) * inverse
        b = (sum_qq * sum_u - sum_q * sum_uq) * inverse
        held = (sum_uq - most * sum_q) / sum_qq if sum_qq > ZERO else ZERO
        a = held if b > most else a
        b = min(b, most)
        loss = a * (a * sum_qq - TWO * sum_uq + TWO * b * sum_q) + b * (b * sum_w - TWO * sum_u)
        reach = a * top
        better = (reach + b >= _COVER) & (b <= ONE - _COVER) & (reach <= _MOST) & (loss < best[2, lane])
        best[0, lane] = a if better else best[0, lane]
        best[1, lane] = b if better else best[1, lane]
        best[2, lane] = loss if better else best[2, lane]


@helper
def _stretch(u: Floats, w: Floats, wu: Floats, low: Floats, span: Floats, below_zero: bool, sums: Floats) -> None:
    """Replace x in u by its place from 0 to 1 over the block's range; low and span hold its least and greatest weight,
    and then its start and length. Sums of w and w u, and the largest offset, go to `sums`."""
    for lane in range(LANES):
        low[lane] = min(low[lane], ZERO) if below_zero else low[lane]
        span[lane] = span[lane] - low[lane]
        inverse = ONE / span[lane] if span[lane] > TINY else ZERO
        sums[0, lane] = ZERO
        sums[1, lane] = ZERO
        sums[2, lane] = inverse
    for i in range(u.shape[0]):
        for lane in range(LANES):
            u[i, lane] = (u[i, lane] - low[lane]) * sums[2, lane]
            wu[i, lane] = w[i, lane] * u[i, lane]
            sums[0, lane] += w[i, lane]
            sums[1, lane] += wu[i, lane]
    for lane in range(LANES):
        sums[2, lane] = -low[lane] * sums[2, lane] if below_zero else FAR


@jit
def _search(
    x: Floats,
    h: Floats,
    weighing: int,
    top: np.float32,
    trials: Floats,
    polish: int,
    below_zero: bool,
    scale: Floats,
    offset: Floats,
) -> None:
    tiles = np.empty((3, x.shape[1], LANES), np.float32)
    u, w, wu = tiles[0], tiles[1], tiles[2]
    rows = np.empty((13, LANES), np.float32)
    low, span, inverse, row = rows[0], rows[1], rows[2], rows[3]
    s, sums, best = rows[4:7], rows[7:10], rows[10:13]
    for first in range(0, x.shape[0], LANES):
        count = load(x, first, u)
        find_range(u, low, span)
        for lane in range(LANES):
            row[lane] = max(span[lane], -low[lane])
        invert(row, inverse)
        _weigh(u, inverse, h, first, weighing, w, row)
        _stretch(u, w, wu, low, span, below_zero, sums)
        step = ONE / top
        for trial in range(trials.shape[0] + polish):
            for lane in range(LANES):
                row[lane] = ZERO if trial < trials.shape[0] else best[1, lane]
                inverse[lane] = top + trials[trial] if trial < trials.shape[0] else ONE / best[0, lane]
            _moments(u, w, wu, row, inverse, top, s)
            if trial == 0:
                for lane in range(LANES):
                    best[0, lane] = step
                    best[1, lane] = ZERO
                    best[2, lane] = step * (step * s[1, lane] - TWO * s[2, lane])
            _fit(s, sums, top, best)
        for lane in range(count):
            b = low[lane] + best[1, lane] * span[lane]
            scale[first + lane] = best[0, lane] * span[lane]
            offset[first + lane] = min(b, ZERO) if below_zero else b


@helper
def _loss(u: Floats, w: Floats, a: Floats, b: Floats, inverse: Floats, top: np.float32, loss: Floats) -> None:
    """Weighted squared error of each block on the grid a q + b, with inverse = 1 / a."""
    loss[:] = ZERO
    for i in range(u.shape[0]):
        for lane in range(LANES):
            q = min(max(np.rint((u[i, lane] - b[lane]) * inverse[lane]), ZERO), top)
            error = a[lane] * q + b[lane] - u[i, lane]
            loss[lane] += w[i, lane] * (error * error)


@helper
def _place(units: Floats, multiples: Floats, a: Floats, b: Floats, inverse: Floats) -> None:
    """The grid of a pair of units and a pair of multiples: scale, offset and 1 / scale."""
    for lane in range(LANES):
        a[lane] = units[0, lane] * multiples[0, lane]
        b[lane] = -(units[1, lane] * multiples[1, lane])
    invert(a, inverse)


@helper
def _try_steps(u: Floats, w: Floats, tops: Floats, steps: Floats, unit: Floats, best: Floats, rows: Floats) -> None:
    """Put the best of the neighbours of `best` [2, LANES], multiples of scale and offset, in its place."""
    a, b, inverse, loss, least = rows[0], rows[1], rows[2], rows[3], rows[4]
    start, tried = best.copy(), np.empty((2, LANES), np.float32)
    least[:] = FAR
    for step in range(steps.shape[0]):
        for which in range(2):
            for lane in range(LANES):
                tried[which, lane] = min(max(start[which, lane] + steps[step, which], ZERO), tops[1])
        _place(unit, tried, a, b, inverse)
        _loss(u, w, a, b, inverse, tops[0], loss)
        for lane in range(LANES):
            better = loss[lane] < least[lane]
            best[0, lane] = tried[0, lane] if better else best[0, lane]
            best[1, lane] = tried[1, lane] if better else best[1, lane]
            least[lane] = loss[lane] if better else least[lane]


@jit
def _find_levels(
    x: Floats, h: Floats, weighing: int, tops: Floats, steps: Floats, units: Floats, multiples: Floats, q: Bytes
) -> None:
    """tops: the highest level, and the highest multiple. units, multiples [2, B]: of scale and offset."""
    n = x.shape[1]
    tiles = np.empty((2, n, LANES), np.float32)
    u, w = tiles[0], tiles[1]
    rows = np.empty((5, LANES), np.float32)
    a, b, inverse = rows[0], rows[1], rows[2]
    unit, best = np.zeros((2, LANES), np.float32), np.zeros((2, LANES), np.float32)
    for first in range(0, x.shape[0], LANES):
        count = load(x, first, u)
        find_range(u, a, b)
        for lane in range(LANES):
            a[lane] = max(b[lane], -a[lane])
        invert(a, inverse)
        if steps.shape[0] > 1:
            _weigh(u, inverse, h, first, weighing, w, a)
        _scale_by(u, inverse)
        for which in range(2):
            for lane in range(count):
                unit[which, lane] = units[which, first + lane] * inverse[lane]
                best[which, lane] = multiples[which, first + lane]
        if steps.shape[0] > 1:
            _try_steps(u, w, tops, steps, unit, best, rows)
        _place(unit, best, a, b, inverse)
        for i in range(n):
            for lane in range(LANES):
                u[i, lane] = min(max(np.rint((u[i, lane] - b[lane]) * inverse[lane]), ZERO), tops[0])
        for lane in range(count):
            multiples[0, first + lane] = best[0, lane]
            multiples[1, first + lane] = best[1, lane]
            for i in range(n):
                q[first + lane, i] = np.uint8(u[i, lane])
