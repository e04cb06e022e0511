"""The search for a block's scale, x ~ scale * level(q), through zero. In torch, on any device.

This is the definition; `symmetric_cpu` is the same arithmetic compiled, and must give the same bytes (see `affine`).
Shapes: x [B, N], B blocks of N weights; h [P, N], the importance of a row's P blocks. Inside: [N, B] and [B].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from whet.quant.grids import CODEBOOK, MOST_SCALE, SMALLEST_COVER, Symmetric
from whet.quant.importance import ordered_sum, reciprocal, weigh

_MIDDLES = tuple((a + b) / 2 for a, b in pairwise(CODEBOOK))


def symmetric_search(x_BN: Tensor, h_PN: Tensor | None, grid: Symmetric) -> Tensor:
    """The best scale [B] of each block, before it is rounded."""
    x = x_BN.T.contiguous()
    extreme = _extreme(x)
    u = x * reciprocal(extreme)
    trials, weighing = grid.search(h_PN is not None)
    w = weigh(u, h_PN, weighing)
    wu = w * u

    def moments(inverse: Tensor | float) -> tuple[Tensor, Tensor]:
        level = _level(u * inverse, grid)
        return ordered_sum(wu * level), ordered_sum(w * level * level)

    one = torch.ones((), device=x.device)
    a = (one / torch.tensor(float(trials[0]), device=x.device)).expand_as(extreme)
    sum_ul, sum_ll = moments(trials[0])
    gain = a * (2 * sum_ul - a * sum_ll)
    a, gain = _fit(sum_ul, sum_ll, grid, a, gain)
    for trial in trials[1:]:
        a, gain = _fit(*moments(trial), grid, a, gain)
    for _ in range(grid.polish):
        a, gain = _fit(*moments(a.reciprocal()), grid, a, gain)
    return a * extreme


def symmetric_levels(
    x_BN: Tensor, h_PN: Tensor | None, grid: Symmetric, d: Tensor, sc: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B, N], counted from the lowest level, for x ~ d * sc * level; neighbours of sc are tried first.

    d, sc: float32 [B]. Returns sc and the codes.
    """
    x = x_BN.T.contiguous()
    inverse = reciprocal(_extreme(x))
    u, d = x * inverse, d * inverse
    if len(grid.steps) > 1:
        w = weigh(u, h_PN, grid.search(h_PN is not None)[1])
        sc = _best_multiple(u, w, grid, d, sc)
    v = u * reciprocal(d * sc)
    code = _code(v) if grid.codebook else _level(v, grid) - grid.low
    return sc, code.to(torch.uint8).T.contiguous()


def _extreme(x: Tensor) -> Tensor:
    """The weight of largest magnitude, with its sign; the positive one of two."""
    low, high = x.amin(0), x.amax(0)
    return torch.where(high >= -low, high, low)


def _level(v: Tensor, grid: Symmetric) -> Tensor:
    """The level nearest to v."""
    if not grid.codebook:
        return v.round().clamp_(grid.low, grid.high)
    return torch.tensor(CODEBOOK, dtype=v.dtype, device=v.device)[_code(v)]


def _code(v: Tensor) -> Tensor:
    return torch.bucketize(v, torch.tensor(_MIDDLES, dtype=v.dtype, device=v.device))


def _fit(sum_ul: Tensor, sum_ll: Tensor, grid: Symmetric, a: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale for these levels, where its gain beats that of a. The loss is sum w u^2 - gain."""
    new = torch.where(sum_ll > 0, sum_ul / sum_ll, 0.0)
    new_gain = new * sum_ul
    reach = new.abs() * -grid.low
    better = (reach >= SMALLEST_COVER) & (reach <= MOST_SCALE) & (new_gain > gain)
    return torch.where(better, new, a), torch.where(better, new_gain, gain)


def _best_multiple(u: Tensor, w: Tensor, grid: Symmetric, d: Tensor, sc: Tensor) -> Tensor:
    best_sc, best = sc, torch.full_like(sc, 1e30)
    for step in grid.steps:
        try_sc = (sc + step).clamp(grid.unit_low, grid.unit_high)
        a = d * try_sc
        error = a * _level(u * reciprocal(a), grid) - u
        loss = ordered_sum(w * (error * error))
        better = loss < best
        best_sc = torch.where(better, try_sc, best_sc)
        best = torch.where(better, loss, best)
    return best_sc
