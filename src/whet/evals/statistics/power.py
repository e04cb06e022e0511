"""What a number of items can show: the chance that the gate sees a gain, the least gain it sees, the items it takes.

The chances are exact for 0/1 scores: those of the decision that the gate makes (Tango's interval and the exact test).
"""

from __future__ import annotations

import math
from functools import lru_cache

from whet.errors import WhetError
from whet.evals.statistics.distributions import normal_quantile
from whet.evals.statistics.tests import chance, thresholds, unconditional_p


def power_of_gain(gain: float, n: int, *, agreement: float, alpha: float = 0.05, over: float = 0.0) -> float:
    """Chance that n items show a true gain to be more than `over`.

    agreement: share of the items on which both models score the same, in 0..1; no more than 1 - gain.
    alpha: 1 - confidence, two-sided.
    """
    _check(n, agreement, alpha)
    unequal = max(1 - agreement, abs(gain))
    return chance(thresholds(_critical_z(n, over, alpha), n, over), n, gain, unequal)


@lru_cache(maxsize=256)
def _critical_z(n: int, over: float, alpha: float) -> float:
    """The least statistic with which n items pass: the interval's quantile, or more where the exact test asks it."""
    z = normal_quantile(1 - alpha / 2)
    if unconditional_p(z, n, over) <= alpha / 2:
        return z
    low, high = z, z + 1
    while unconditional_p(high, n, over) > alpha / 2 and high < z + 16:
        low, high = high, high + 1
    while high - low > 5e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if unconditional_p(middle, n, over) > alpha / 2 else (low, middle)
    return high


def detectable_gain(
    n: int,
    *,
    baseline_rate: float,
    agreement: float = 0.8,
    alpha: float = 0.05,
    power: float = 0.8,
    over: float = 0.0,
) -> float:
    """The least true gain that n items show with a chance of `power`; infinite where even a perfect model would not.

    baseline_rate: the baseline's mean score, which leaves 1 - baseline_rate to be gained.
    """
    _check(n, agreement, alpha)
    gain = _least_gain(n, agreement, alpha, power, over)
    return gain if gain <= 1 - baseline_rate else math.inf


@lru_cache(maxsize=4096)
def _least_gain(n: int, agreement: float, alpha: float, power: float, over: float) -> float:
    """The gain whose power is `power`, by bisection; infinite where a gain of 1 has less."""
    low, high = max(over, 0.0), 1.0
    if power_of_gain(high, n, agreement=agreement, alpha=alpha, over=over) < power:
        return math.inf
    while high - low > 1e-4:
        middle = (low + high) / 2
        seen = power_of_gain(middle, n, agreement=agreement, alpha=alpha, over=over) >= power
        low, high = (low, middle) if seen else (middle, high)
    return high


def sample_size(
    gain: float, *, agreement: float = 0.8, alpha: float = 0.05, power: float = 0.8, over: float = 0.0
) -> int:
    """The fewest items that show a true gain with a chance of `power`. Raises WhetError for a gain not above `over`."""
    if not over < gain <= 1:
        fix = "ask for a gain above the one that is required"
        raise WhetError(f"no number of items shows a gain of {gain} to be over {over}", where="sample_size", fix=fix)
    low, high = 1, 8
    while power_of_gain(gain, high, agreement=agreement, alpha=alpha, over=over) < power:
        low, high = high, math.ceil(high * 1.5)
        if high > 2**22:
            raise WhetError("more than four million items", where="sample_size", fix="ask for a larger gain")
    while high - low > 1:
        middle = (low + high) // 2
        seen = power_of_gain(gain, middle, agreement=agreement, alpha=alpha, over=over) >= power
        low, high = (low, middle) if seen else (middle, high)
    return high


def describe_power(
    n: int, *, baseline_rate: float, agreement: float = 0.8, alpha: float = 0.05, power: float = 0.8, over: float = 0.0
) -> str:
    """In a sentence: "With 40 prompts a gain under 23 points cannot be seen (...)"."""
    gain = detectable_gain(n, baseline_rate=baseline_rate, agreement=agreement, alpha=alpha, power=power, over=over)
    prompts = f"{n} prompt" + ("s" if n != 1 else "")
    terms = f"{power:.0%} power, {1 - alpha:.4g} confidence, models that agree on {agreement:.0%}"
    if math.isinf(gain):
        return f"With {prompts} no gain can be seen ({terms})."
    return f"With {prompts} a gain under {math.ceil(100 * gain - 1e-6)} points cannot be seen ({terms})."


def _check(n: int, agreement: float, alpha: float) -> None:
    if n < 1 or not 0 <= agreement <= 1 or not 0 < alpha < 1:
        fix = "give n >= 1, agreement in 0..1 and alpha in 0..1"
        raise WhetError(f"n={n}, agreement={agreement}, alpha={alpha}", where="power", fix=fix)
