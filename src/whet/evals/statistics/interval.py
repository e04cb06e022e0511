"""An estimate with its confidence interval, and the checks that every statistic makes of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from whet.errors import WhetError
from whet.evals.statistics.distributions import Floats


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval: low and high each leave out (1 - confidence) / 2."""

    estimate: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.estimate:.3f} ({self.confidence:.4g}: {self.low:.3f} to {self.high:.3f})"

    def points(self, *, signed: bool = False) -> str:
        """In points of 100: `6.0 (1.2 to 10.8)`; with a sign, for differences."""
        sign = "+" if signed else ""
        estimate, low, high = (100 * value + 0.0 for value in (self.estimate, self.low, self.high))
        return f"{estimate:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def tail(confidence: float) -> float:
    """What is left out at each end. Raises WhetError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise WhetError(f"a confidence of {confidence} is not between 0 and 1", where="confidence", fix="write 0.95")
    return (1 - confidence) / 2


def as_numbers(values: Sequence[float] | Floats, where: str, *, least: int = 1) -> Floats:
    """One row of finite numbers. Raises WhetError for fewer than `least`, and for what is not finite."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise WhetError("not a row of numbers", where=where, fix="give one number an item") from None
    if numbers.ndim != 1:
        raise WhetError(f"{numbers.ndim} dimensions where one is expected", where=where, fix="give one number an item")
    if len(numbers) < least:
        raise WhetError(f"{len(numbers)} items, and at least {least} are needed", where=where, fix="give more items")
    if not np.isfinite(numbers).all():
        first = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise WhetError(f"item {first} is {numbers[first]}", where=where, fix="give finite numbers")
    return numbers


def as_scores(values: Sequence[float] | Floats, where: str, *, least: int = 1) -> Floats:
    """One row of scores between 0 and 1. Raises WhetError otherwise."""
    scores = as_numbers(values, where, least=least)
    if ((scores < 0) | (scores > 1)).any():
        first = int(np.flatnonzero((scores < 0) | (scores > 1))[0])
        raise WhetError(f"item {first} is {scores[first]}, not between 0 and 1", where=where, fix="scale the scores")
    return scores


def as_pairs(candidate: Sequence[float] | Floats, baseline: Sequence[float] | Floats) -> Floats:
    """candidate - baseline, item by item. Raises WhetError where the two are not of one length."""
    first, second = as_scores(candidate, "candidate"), as_scores(baseline, "baseline")
    if len(first) != len(second):
        fix = "give both scores for the same items, in one order"
        raise WhetError(f"{len(first)} scores against {len(second)}", where="candidate and baseline", fix=fix)
    return first - second


def is_binary(scores: Floats) -> bool:
    """Whether all are 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())
