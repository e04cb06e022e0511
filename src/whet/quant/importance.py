"""How much each rounding error of a block counts, in torch: `grids.Weighing` says by what rule.

Arrays are transposed to [N, B], so that a block's sums run over the first axis: B blocks of N weights. Sums are taken
in order, one weight after the other, here and in `tiles`: then every device and processor gives the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.quant.grids import NEGLIGIBLE, Weighing


def ordered_sum(terms_NB: Tensor) -> Tensor:
    """Sum over the first axis, from the first row to the last."""
    total = terms_NB[0].clone()
    for row in terms_NB[1:]:
        total += row
    return total


def reciprocal(x: Tensor) -> Tensor:
    """1 / x, and 0 where |x| is negligible."""
    return torch.where(x.abs() > NEGLIGIBLE, x.reciprocal(), 0.0)


def weigh(u_NB: Tensor, h_PN: Tensor | None, weighing: Weighing) -> Tensor:
    """The weight [N, B] of each error. u: x relative to its block's largest magnitude. h: importance of a row's P
    blocks, whose rows follow each other in u."""
    if weighing >= Weighing.IMPORTANCE:
        assert h_PN is not None
        h_NB = _relative(h_PN).T.repeat(1, u_NB.shape[1] // h_PN.shape[0])
        return h_NB if weighing == Weighing.IMPORTANCE else h_NB * _sqrt(_mean_square(u_NB) + u_NB * u_NB)
    return u_NB.abs() + _sqrt(_mean_square(u_NB)) if weighing == Weighing.SUM else u_NB.abs()


def _mean_square(u_NB: Tensor) -> Tensor:
    return ordered_sum(u_NB * u_NB) * (1 / u_NB.shape[0])


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root. torch's own on the CPU is off by a bit of float32 now and then; CUDA's is not."""
    return x.double().sqrt().float() if x.device.type == "cpu" else x.sqrt()


def _relative(h_PN: Tensor) -> Tensor:
    """Importance relative to its block's greatest; ones where the whole block has none."""
    largest = h_PN.amax(1, keepdim=True)
    return torch.where(largest > 0, h_PN / largest, 1.0)
