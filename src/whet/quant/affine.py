"""The search for a block's scale and offset, x ~ scale * q + offset with q in [0, top]. In torch, on any device.

This is the definition; `affine_cpu` is the same arithmetic compiled, and must give the same bytes. So sums run in
order, products and sums are separate operations, and nothing is divided by a Python number (CUDA would multiply by its
reciprocal).

Shapes: x [B, N], B blocks of N weights; h [P, N], the importance of a row's P blocks. Inside: [N, B] and [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.quant.grids import MOST_SCALE, SMALLEST_COVER, Affine
from whet.quant.importance import ordered_sum, reciprocal, weigh


class _Problem:
    """Weighted least squares of many blocks. u [N, B]: x from 0 to 1 over the block's range.

    most [B]: the largest offset allowed, in the same units. a, b, loss [B]: the best so far; the loss lacks the
    constant sum w u^2.
    """

    def __init__(self, u: Tensor, w: Tensor, most: Tensor, top: int):
        self.u, self.w, self.wu = u, w, w * u
        self.sum_w, self.sum_u = ordered_sum(w), ordered_sum(self.wu)
        self.most, self.top = most, top
        step = torch.ones((), device=u.device) / torch.tensor(float(top), device=u.device)
        _, sum_qq, sum_uq = moments = self.moments(0.0, float(top))
        self.a, self.b = step.expand_as(most), torch.zeros_like(most)
        self.loss = step * (step * sum_qq - 2 * sum_uq)
        self.fit(*moments)

    def moments(self, offset: Tensor | float, inverse: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of w q, w q^2 and w u q, for the q that (u - offset) * inverse rounds to."""
        q = ((self.u - offset) * inverse).round_().clamp_(0, self.top)
        wq = self.w * q
        return ordered_sum(wq), ordered_sum(wq * q), ordered_sum(self.wu * q)

    def fit(self, sum_q: Tensor, sum_qq: Tensor, sum_uq: Tensor) -> None:
        """The best a and b for a q with these moments; kept where they beat what is there."""
        det = self.sum_w * sum_qq - sum_q * sum_q
        inverse = torch.where(det > 0, det.reciprocal(), 0.0)
        a = (self.sum_w * sum_uq - self.sum_u * sum_q) * inverse
        b = (sum_qq * self.sum_u - sum_q * sum_uq) * inverse
        held = torch.where(sum_qq > 0, (sum_uq - self.most * sum_q) / sum_qq, 0.0)
        a = torch.where(b > self.most, held, a)
        b = torch.where(b > self.most, self.most, b)
        loss = a * (a * sum_qq - 2 * sum_uq + 2 * b * sum_q) + b * (b * self.sum_w - 2 * self.sum_u)
        reach = a * self.top
        covers = (reach + b >= SMALLEST_COVER) & (b <= 1 - SMALLEST_COVER) & (reach <= MOST_SCALE)
        better = covers & (loss < self.loss)
        self.a = torch.where(better, a, self.a)
        self.b = torch.where(better, b, self.b)
        self.loss = torch.where(better, loss, self.loss)


def affine_search(x_BN: Tensor, h_PN: Tensor | None, grid: Affine) -> tuple[Tensor, Tensor]:
    """The best scale and offset [B] of each block, before they are rounded."""
    x = x_BN.T.contiguous()
    low, high = x.amin(0), x.amax(0)
    trials, weighing = grid.search(h_PN is not None)
    w = weigh(x * reciprocal(torch.maximum(high, -low)), h_PN, weighing)
    low = low.clamp(max=0) if grid.below_zero else low
    span = high - low
    inverse = reciprocal(span)
    most = -low * inverse if grid.below_zero else torch.full_like(low, 1e30)
    problem = _Problem((x - low) * inverse, w, most, grid.top)
    for trial in trials:
        problem.fit(*problem.moments(0.0, grid.top + trial))
    for _ in range(grid.polish):
        problem.fit(*problem.moments(problem.b, problem.a.reciprocal()))
    scale, offset = problem.a * span, low + problem.b * span
    return scale, offset.clamp(max=0) if grid.below_zero else offset


def affine_levels(
    x_BN: Tensor, h_PN: Tensor | None, grid: Affine, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels q uint8 [B, N] for x ~ d * sc * q - dmin * m, after trying the neighbours of the multiples sc and m.

    d, dmin, sc, m: float32 [B]. Returns sc, m and q.
    """
    x = x_BN.T.contiguous()
    inverse = reciprocal(torch.maximum(x.amax(0), -x.amin(0)))
    u = x * inverse
    d, dmin = d * inverse, dmin * inverse
    if len(grid.steps) > 1:
        w = weigh(u, h_PN, grid.search(h_PN is not None)[1])
        sc, m = _best_multiples(u, w, grid, d, dmin, sc, m)
    a, b = d * sc, -(dmin * m)
    q = _levels(u, a, b, grid.top)
    return sc, m, q.to(torch.uint8).T.contiguous()


def _levels(u: Tensor, a: Tensor, b: Tensor, top: int) -> Tensor:
    return ((u - b) * reciprocal(a)).round_().clamp_(0, top)


def _best_multiples(
    u: Tensor, w: Tensor, grid: Affine, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    best_sc, best_m, best = sc, m, torch.full_like(sc, 1e30)
    for step_sc, step_m in grid.steps:
        try_sc, try_m = (sc + step_sc).clamp(0, grid.unit_top), (m + step_m).clamp(0, grid.unit_top)
        a, b = d * try_sc, -(dmin * try_m)
        error = a * _levels(u, a, b, grid.top) + b - u
        loss = ordered_sum(w * (error * error))
        better = loss < best
        best_sc = torch.where(better, try_sc, best_sc)
        best_m = torch.where(better, try_m, best_m)
        best = torch.where(better, loss, best)
    return best_sc, best_m
