"""The two kinds of grid that a block's weights are rounded to, and the settings of the search for the best one.

An affine grid has evenly spaced levels above an offset, x ~ scale * q + offset with q in [0, top]. A symmetric one goes
through zero: x ~ scale * level(q), with levels evenly spaced in [low, high], or those of a codebook. The search makes
sum w * (decoded - x)^2 small over a block: trial scales give q, weighted least squares gives scale (and offset) for
that q, and the best is polished by alternating the two. Where scales are then rounded to a few bits, neighbours of the
rounded one are tried and q is taken anew for each.

What a grid is searched with lives here; the searches are `affine` and `symmetric` in torch, and `affine_cpu` and
`symmetric_cpu`, which give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

# A magnitude this small has no fp16 scale but zero, and its reciprocal would overflow.
NEGLIGIBLE = 2.0**-100
# A fit must reach from end to end over this share of the block's range at least, and this multiple at most. Importance
# that sits on a few weights could otherwise choose a grid that clips all others.
SMALLEST_COVER, MOST_SCALE = 0.625, 1.5


class Weighing(IntEnum):
    """How much an error counts, by the weight x it is made on; u = x / max|x| of the block, h its importance."""

    MAGNITUDE = 0  # |u|
    SUM = 1  # |u| + rms(u)
    IMPORTANCE = 2  # h
    SMOOTHED = 3  # h * sqrt(mean(u^2) + u^2)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What both kinds have.

    n: weights a block. trials: the first scales to try; `guided_trials` instead where importance is given, since the
    best grid then lies further from the plain one. polish: how often to alternate q and least squares. weighing,
    guided: how errors count without importance and with it.
    """

    n: int
    trials: tuple[float, ...]
    weighing: Weighing
    guided: Weighing = Weighing.SMOOTHED
    guided_trials: tuple[float, ...] = ()
    polish: int = 2

    def search(self, guided: bool) -> tuple[tuple[float, ...], Weighing]:
        """Trials and weighing, with importance or without."""
        return (self.guided_trials or self.trials, self.guided) if guided else (self.trials, self.weighing)


@dataclass(frozen=True, kw_only=True)
class Affine(Grid):
    """top: the highest q. trials: added to `top` steps over a block's range. below_zero: the offset is never positive.

    unit_top: scale and offset are multiples in [0, unit_top] of an fp16 unit that `group` blocks share; 0: each block
    has its own fp16 pair. steps: what to add to the two multiples, in turn; the first is (0, 0).
    """

    top: int
    below_zero: bool = True
    group: int = 1
    unit_top: int = 0
    steps: tuple[tuple[int, int], ...] = ((0, 0),)


@dataclass(frozen=True, kw_only=True)
class Symmetric(Grid):
    """low, high: the range of levels. trials: the level at which the weight of largest magnitude is put; the first is
    the plain one.

    unit_low, unit_high: the scale is a multiple in this range of an fp16 unit that `group` blocks share; 0, 0: each
    block has its own fp16 scale. steps: what to add to the multiple, in turn; the first is 0.
    codebook: the levels are `CODEBOOK`, and low and high its ends.
    """

    low: int
    high: int
    group: int = 1
    unit_low: int = 0
    unit_high: int = 0
    steps: tuple[int, ...] = (0,)
    codebook: bool = False


# IQ4_NL's levels, denser around zero. Source: ggml's kvalues_iq4nl, a fact of the format.
CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
