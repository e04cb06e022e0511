"""Tests on the same items for two models, exact where scores are 0 or 1, and care for several tests at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from whet.errors import WhetError
from whet.evals.statistics.distributions import (
    Floats,
    Integers,
    binomial_at_least,
    binomial_at_most,
    binomial_pmf,
    t_upper,
)
from whet.evals.statistics.interval import as_pairs, is_binary
from whet.evals.statistics.paired import adjusted_t

DISCORDANCE = 120  # shares of unequal pairs among which the worst case is looked for


def mcnemar(candidate: Sequence[float] | Floats, baseline: Sequence[float] | Floats) -> float:
    """Exact two-sided p for "neither is better" on 0/1 scores: of the unequal pairs, each side gets half.

    McNemar (Psychometrika 12, 1947), with binomial tails. Raises WhetError for graded scores.
    """
    difference = as_pairs(candidate, baseline)
    if not is_binary(np.asarray(candidate)) or not is_binary(np.asarray(baseline)):
        raise WhetError("McNemar's test is for scores of 0 and 1", where="mcnemar", fix="use paired_difference")
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    return min(1.0, 2 * binomial_at_most(min(better, worse), better + worse, 0.5)) if better + worse else 1.0


def excess_p(candidate: Sequence[float] | Floats, baseline: Sequence[float] | Floats, limit: float = 0.0) -> float:
    """One-sided p for "candidate is better than baseline by no more than `limit`".

    0/1 scores: exact and unconditional, whatever share of the pairs is unequal (Sidik, Communications in Statistics
    32, 2003). Graded ones: Student's t on the differences with one pair added for and one against the candidate.
    """
    difference = as_pairs(candidate, baseline)
    if is_binary(np.asarray(candidate)) and is_binary(np.asarray(baseline)):
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        return unconditional_p(tango_z(better, worse, len(difference), limit), len(difference), limit)
    t, df = adjusted_t(difference, limit)
    return t_upper(t, df)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted so that the chance of any false rejection stays below the level (Holm 1979)."""
    if any(not 0 <= value <= 1 for value in p.values()):
        raise WhetError("a p-value is not between 0 and 1", where="holm", fix="give p-values")
    adjusted, floor = {}, 0.0
    for rank, (name, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, (len(p) - rank) * value))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p}


def tango_z(better: int, worse: int, n: int, limit: float) -> float:
    """Tango's score statistic for a gain over `limit`; 0 where all items fit it exactly."""
    return float(_tango_z(np.array([better]), np.array([worse]), n, limit)[0])


def _tango_z(better: Integers | Floats, worse: Integers | Floats, n: int, limit: float) -> Floats:
    """(better - worse - n limit) / sqrt(n (2 q + limit (1 - limit))), q the likeliest share of `worse` at that gain."""
    b = -better - worse + (2 * n - better + worse) * limit
    c = -worse * limit * (1 - limit)
    q = (np.sqrt(np.maximum(b * b - 8 * n * c, 0)) - b) / (4 * n)
    variance = n * (2 * q + limit * (1 - limit))
    over = better - worse - n * limit
    with np.errstate(divide="ignore", invalid="ignore"):
        z: Floats = np.where(
            variance > 1e-12, over / np.sqrt(variance), np.where(np.abs(over) < 1e-9, 0.0, over * np.inf)
        )
    return np.nan_to_num(z, nan=0.0, posinf=math.inf, neginf=-math.inf)


@lru_cache(maxsize=1024)
def thresholds(z: float, n: int, limit: float) -> Floats:
    """For each number m = 0..n of unequal pairs, the least number of better ones with a statistic of at least z.

    m + 1 where none has. The statistic rises with the better ones, so a bisection finds it.
    """
    m = np.arange(n + 1, dtype=np.float64)
    low, high = np.full(n + 1, -1.0), m + 1
    for _ in range(math.ceil(math.log2(n + 2)) + 1):
        middle = np.floor((low + high) / 2)
        reached = _tango_z(middle, m - middle, n, limit) >= z - 1e-9
        open_ = high - low > 1
        high, low = np.where(open_ & reached, middle, high), np.where(open_ & ~reached, middle, low)
    high.setflags(write=False)  # it is kept and shared
    return high


def chance(least_better: Floats, n: int, gain: float, unequal: float) -> float:
    """P(statistic in the region) when a share `unequal` of the pairs differs and the true gain is `gain`."""
    spread = 9 * math.sqrt(n * unequal * (1 - unequal)) + 30  # numbers of unequal pairs beyond have no weight
    m = np.arange(max(0, math.floor(n * unequal - spread)), min(n, math.ceil(n * unequal + spread)) + 1)
    share = (1 + gain / unequal) / 2 if unequal > 0 else 0.5  # of the unequal pairs, those that are better
    return float(binomial_pmf(m, n, unequal) @ binomial_at_least(least_better[m], m, min(max(share, 0.0), 1.0)))


@lru_cache(maxsize=4096)
def unconditional_p(z: float, n: int, limit: float) -> float:
    """The largest chance of a statistic of at least z at a true gain of `limit`, over all shares of unequal pairs."""
    region = thresholds(z, n, limit)
    least = max(abs(limit), 0.05 / n)
    shares = np.unique(
        np.concatenate([np.geomspace(least, 1, DISCORDANCE // 2), np.linspace(least, 1, DISCORDANCE // 2)])
    )
    return min(1.0, max(chance(region, n, limit, float(share)) for share in shares))
