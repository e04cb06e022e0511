"""Intervals for one model's results: a rate, a mean score, a ratio such as loss a token, and a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from whet.errors import WhetError
from whet.evals.statistics.distributions import Floats, normal_quantile, t_quantile
from whet.evals.statistics.interval import Interval, as_numbers, as_scores, is_binary, tail
from whet.evals.statistics.score_method import score_interval

REACH = 0.55  # over 20,000 simulations a setting, 93.8 to 96.1% of 95% intervals hold the mean; with 0.5, up to 96.5%


def proportion(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A rate of 0/1 outcomes, by Wilson's score interval (1927): it has a width at 0 of n and at n of n too."""
    if n < 1 or not 0 <= successes <= n:
        raise WhetError(f"{successes} of {n} is not a rate", where="proportion", fix="give counts, n at least 1")
    z2 = normal_quantile(1 - tail(confidence)) ** 2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * n)) / n) / (1 + z2 / n)
    low = 0.0 if successes == 0 else centre - half  # exactly, where rounding would miss it
    high = 1.0 if successes == n else centre + half
    return Interval(rate, low, high, confidence)


def mean(scores: Sequence[float] | Floats, confidence: float = 0.95) -> Interval:
    """The mean of scores between 0 and 1: Wilson's interval for 0/1 scores, the score method for graded ones."""
    x = as_scores(scores, "scores")
    if is_binary(x):
        return proportion(int(x.sum()), len(x), confidence)
    low, high = mean_ends(x[None], confidence)
    return Interval(float(x.mean()), float(low[0]), float(high[0]), confidence)


def mean_ends(x_SN: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Both ends of `mean` for S sets of N graded scores.

    The support is taken to reach r^0.55 from the mean to both sides, within 0 to 1, where r is how far the furthest
    score lies from it: about halfway, geometrically, between what was seen and the whole scale. With r the interval is
    too short for scores that are nearly all equal, with the whole scale too long for those that spread little.
    """
    mean_S = x_SN.mean(1)
    reach_S = np.abs(x_SN - mean_S[:, None]).max(1)
    reach_S = np.where(reach_S > 1e-9, reach_S**REACH, 1.0)
    low_S, high_S = np.maximum(mean_S - reach_S, 0), np.minimum(mean_S + reach_S, 1)
    return score_interval(x_SN, np.ones_like(x_SN), low_S, high_S, normal_quantile(1 - tail(confidence)))


def ratio(numerators: Sequence[float] | Floats, denominators: Sequence[float] | Floats, confidence: float) -> Interval:
    """sum(numerators) / sum(denominators) over rows drawn together, as a loss a token over texts.

    Student's interval on the linearised ratio (Cochran, Sampling Techniques, 1977, section 6.3), N - 1 degrees of
    freedom. Raises WhetError for fewer than two rows or a denominator that is not positive.
    """
    top, bottom = as_numbers(numerators, "numerators", least=2), as_numbers(denominators, "denominators", least=2)
    if len(top) != len(bottom) or (bottom <= 0).any():
        fix = "give one positive denominator a numerator"
        raise WhetError("numerators and denominators do not go together", where="ratio", fix=fix)
    n, estimate = len(top), float(top.sum() / bottom.sum())
    error = math.sqrt(n / (n - 1) * float(((top - estimate * bottom) ** 2).sum())) / float(bottom.sum())
    half = t_quantile(1 - tail(confidence), n - 1) * error
    return Interval(estimate, estimate - half, estimate + half, confidence)


def over_seeds(runs: Sequence[float] | Sequence[Sequence[float]] | Floats, confidence: float = 0.95) -> Interval:
    """What training again, with another seed, would bring on average.

    runs: one mean a seed, for Student's interval over the seeds; or the scores [seeds, items], the same items in each
    row, which counts the draw of the items too: a two-way layout with both at random, degrees of freedom after
    Satterthwaite. Raises WhetError for one seed, which says nothing of another.
    """
    x = np.asarray(runs, dtype=np.float64)
    if x.ndim not in (1, 2) or x.size == 0 or x.shape[0] < 2 or not np.isfinite(x).all():
        fix = "give at least two seeds, each with one mean or with finite scores of the same items"
        raise WhetError("these runs say nothing about another seed", where="over_seeds", fix=fix)
    if x.ndim == 2 and x.shape[1] > 1:
        variance, df = _two_way(x)
    else:
        x = x.reshape(len(x), -1)
        variance, df = float(x.var(ddof=1)) / len(x), len(x) - 1.0
    half = t_quantile(1 - tail(confidence), df) * math.sqrt(variance)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, confidence)


def _two_way(x_KN: Floats) -> tuple[float, float]:
    """Variance of the grand mean of K seeds on N items, and its degrees of freedom.

    (MS_seed + MS_item - MS_rest) / (K N); MS are the layout's mean squares. At least MS_seed / (K N).
    """
    k, n = x_KN.shape
    grand, seed_K, item_N = x_KN.mean(), x_KN.mean(1), x_KN.mean(0)
    between_seeds = n * float(((seed_K - grand) ** 2).sum()) / (k - 1)
    between_items = k * float(((item_N - grand) ** 2).sum()) / (n - 1)
    rest = float(((x_KN - seed_K[:, None] - item_N + grand) ** 2).sum()) / ((k - 1) * (n - 1))
    total = max(between_seeds + between_items - rest, between_seeds)
    spread = between_seeds**2 / (k - 1) + between_items**2 / (n - 1) + rest**2 / ((k - 1) * (n - 1))
    return total / (k * n), max(total**2 / spread if spread else k - 1.0, 1.0)
