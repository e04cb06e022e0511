"""Score intervals for the mean of bounded values, without a distribution: Wilson's and Tango's are special cases.

A mean d is in the interval when the data do not refute it:

    | m - d | <= z sqrt(V(d) / n)

with m the mean of the n values and V(d) the variance of the distribution that fits the data best among those on the
same support whose mean is d (empirical likelihood). Its weights are w_i = 1 / (n (1 + a (x_i - d))), with a from
sum w_i (x_i - d) = 0; an end of the support that no value reached takes the mass that is left.

For 0/1 values V(d) = d (1 - d), which is Wilson's interval (1927). For differences of 0/1 values it is Tango's
(Statistics in Medicine 17, 1998). For values without ties it is close to Student's. Because V follows d, the interval
leans the way the data do, and it has a width even when all values are equal: this is what the plain bootstrap lacks.
Owen, Empirical Likelihood (2001), chapter 2, for the weights.

Shapes: x_SK distinct or repeated values and count_SK how often each was seen; S data sets at once, K values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from whet.evals.statistics.distributions import Floats, Integers

Excess: TypeAlias = Callable[[Floats, Integers], Floats]

NEWTON_STEPS = 60
ROOT_STEPS = 60
CLOSE = 1e-10
EDGE = 1e-12  # how near to its pole the multiplier may come


def score_interval(x_SK: Floats, count_SK: Floats, low_S: Floats, high_S: Floats, z: float) -> tuple[Floats, Floats]:
    """Both ends for each data set, whose values lie in [low, high]; z is the normal quantile of the confidence."""
    n_S = count_SK.sum(1)
    mean_S = (count_SK * x_SK).sum(1) / n_S
    ends_S2, none_S2 = np.stack([low_S, high_S], 1), np.zeros((len(low_S), 2))
    x_SK, count_SK = np.concatenate([x_SK, ends_S2], 1), np.concatenate([count_SK, none_S2], 1)

    def excess(mean_of_null_S: Floats, keep_S: Integers) -> Floats:
        """Squared distance from the mean less what the null allows: 0 at an end of the interval, negative inside."""
        variance = variance_under(x_SK[keep_S], count_SK[keep_S], mean_of_null_S)
        distance: Floats = n_S[keep_S] * (mean_S[keep_S] - mean_of_null_S) ** 2 - z * z * variance
        return distance

    return _end(excess, mean_S, low_S), _end(excess, mean_S, high_S)


def _end(excess: Excess, inside_S: Floats, outside_S: Floats) -> Floats:
    """Where `excess` crosses 0 between the mean and an end of the support, by regula falsi with Illinois' halving."""
    end_S = outside_S.copy()
    todo_L = np.flatnonzero(np.abs(inside_S - outside_S) > CLOSE)  # L data sets are left to search
    a_L, b_L = inside_S[todo_L], outside_S[todo_L]
    fa_L = np.minimum(excess(a_L, todo_L), -1e-12)  # 0 where all values are equal, and negative right beside
    fb_L = excess(b_L + EDGE * (a_L - b_L), todo_L)  # at the very end of the support only a point mass has that mean
    side_L = np.zeros(len(todo_L))
    going_L = fb_L > 0
    for step in range(ROOT_STEPS):
        todo_L, side_L = todo_L[going_L], side_L[going_L]
        a_L, b_L, fa_L, fb_L = a_L[going_L], b_L[going_L], fa_L[going_L], fb_L[going_L]
        if not len(todo_L):
            break
        secant_L = (a_L * fb_L - b_L * fa_L) / (fb_L - fa_L)
        c_L = (a_L + b_L) / 2 if step % 4 == 3 else secant_L  # a bisection now and then bounds the steps
        fc_L = excess(c_L, todo_L)
        inner_L = fc_L < 0
        fa_L = np.where(inner_L, fc_L, np.where(side_L == 1, fa_L / 2, fa_L))
        fb_L = np.where(inner_L, np.where(side_L == -1, fb_L / 2, fb_L), fc_L)
        a_L, b_L = np.where(inner_L, c_L, a_L), np.where(inner_L, b_L, c_L)
        side_L = np.where(inner_L, -1, 1)
        end_S[todo_L] = c_L
        going_L = np.abs(b_L - a_L) > CLOSE
    return end_S


def variance_under(x_SK: Floats, count_SK: Floats, mean_S: Floats) -> Floats:
    """V(d): variance of the best-fitting distribution on the values x whose mean is d, a row each.

    The values must reach to both sides of d; those counted 0 are the ends of the support.
    """
    u_SK = x_SK - mean_S[:, None]
    n_S = count_SK.sum(1)
    top, bottom = u_SK.max(1), u_SK.min(1)
    low, high = -(1 - EDGE) / np.maximum(top, EDGE), (1 - EDGE) / np.maximum(-bottom, EDGE)
    multiplier = _multiplier(u_SK, count_SK, low.copy(), high.copy())
    weight_SK = count_SK / (n_S[:, None] * (1 + multiplier[:, None] * u_SK))
    left = np.maximum(1 - weight_SK.sum(1), 0)  # more than rounding only where the multiplier is at its limit
    end = np.where(multiplier > 0, bottom, top)
    variance: Floats = (weight_SK * u_SK**2).sum(1) + left * end**2
    return variance


def _multiplier(u_SK: Floats, count_SK: Floats, low_S: Floats, high_S: Floats) -> Floats:
    """Root of the falling function sum count u / (1 + a u) in [low, high], or the end that is nearest to one."""
    still_above_S = _tilt(high_S, u_SK, count_SK) > 0  # no root: the bottom of the support takes mass
    still_below_S = _tilt(low_S, u_SK, count_SK) < 0
    low_S, high_S = np.where(still_above_S, high_S, low_S), np.where(still_below_S, low_S, high_S)
    a_S: Floats = np.clip(0.0, low_S, high_S)
    for _ in range(NEWTON_STEPS):
        over_SK = u_SK / (1 + a_S[:, None] * u_SK)
        value, slope = (count_SK * over_SK).sum(1), -(count_SK * over_SK**2).sum(1)
        low_S, high_S = np.where(value > 0, a_S, low_S), np.where(value > 0, high_S, a_S)
        step = a_S - value / np.minimum(slope, -1e-300)
        newton = (step > low_S) & (step < high_S)
        following: Floats = np.clip(np.where(newton, step, (low_S + high_S) / 2), low_S, high_S)
        if (np.abs(following - a_S) <= 1e-11 * (1 + np.abs(a_S))).all():
            return following
        a_S = following
    return a_S


def _tilt(a_S: Floats, u_SK: Floats, count_SK: Floats) -> Floats:
    tilt_S: Floats = (count_SK * u_SK / (1 + a_S[:, None] * u_SK)).sum(1)
    return tilt_S
