"""How far raters agree beyond chance: Cohen's kappa of two, Krippendorff's alpha of two and more, with intervals.

    kappa = 1 - observed / expected     expected: the two raters' marginals, independent of each other
    alpha = 1 - observed / expected     expected: any two ratings of all

observed and expected are mean differences d(a, b) of two ratings: of one item, and by chance. 1 is full agreement, 0 as
much as chance gives; below 0 less.

    level      d(a, b), kappa                       d(a, b), alpha
    nominal    a != b                               a != b
    ordinal    |steps from a to b| (linear)         squared ratings between a and b, of a and b themselves half
    interval   (a - b)^2 (quadratic)                (a - b)^2

Raters who agree on every item would have an interval without width. Theirs ends at 1 - q / (1 - e): q is the largest
share of disagreeing items that still may show none (Wilson), e how often chance pairs are equal, and what disagrees is
taken to differ as much as chance pairs do that are not equal.

Sources: Fleiss, Cohen & Everitt 1969 (kappa's large-sample variance); Krippendorff 2011, Computing Krippendorff's
Alpha-Reliability; Hayes & Krippendorff 2007 (bootstrap of the items for alpha's interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from whet.evals.statistics import Interval, proportion

Level = Literal["nominal", "ordinal", "interval"]
Ratings = Sequence[float | None]
Numbers = NDArray[np.float64]
MEMORY = 2**24  # numbers of a bootstrap held at a time


def cohen_kappa(
    one: Sequence[float], other: Sequence[float], *, level: Level = "nominal", confidence: float = 0.95
) -> Interval | None:
    """Kappa of two raters of the same items, in the same order. None where both give one and the same rating alone.

    The interval is the normal one of the large-sample variance, unless all agree.
    """
    if not one or len(one) != len(other):
        raise ValueError(f"two ratings an item: {len(one)} and {len(other)}")
    values = np.unique([*one, *other])
    if len(values) == 1:
        return None
    joint = np.zeros((len(values), len(values)))
    np.add.at(joint, (np.searchsorted(values, one), np.searchsorted(values, other)), 1 / len(one))
    weight = 1 - _kappa_difference(values, level)
    rows, columns = joint.sum(1), joint.sum(0)
    observed, expected = float((joint * weight).sum()), float(rows @ weight @ columns)
    kappa = 1 - (1 - observed) / (1 - expected)
    if np.trace(joint) > 1 - 1e-9:
        return _all_agree(len(one), float(rows @ columns), confidence)
    of_rows, of_columns = weight @ columns, rows @ weight
    spread = weight - (of_rows[:, None] + of_columns) * (1 - kappa)
    variance = (joint * spread**2).sum() - (kappa - expected * (1 - kappa)) ** 2
    error = float(np.sqrt(max(0.0, variance) / len(one)) / (1 - expected))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Interval(kappa, max(-1.0, kappa - reach), min(1.0, kappa + reach), confidence)


def krippendorff_alpha(
    items: Sequence[Ratings],
    *,
    level: Level = "ordinal",
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval | None:
    """Alpha of the items' ratings; None stands for a rating that is missing, and order within an item says nothing.

    None where no item has two ratings, or where all are the same. The interval is the percentile bootstrap's over the
    items, unless all agree.
    """
    paired = [present for item in items if len(present := [rating for rating in item if rating is not None]) > 1]
    values = np.unique([rating for item in paired for rating in item])
    if len(values) < 2:
        return None
    of_items = np.stack([_coincidences(item, values) for item in paired])
    alpha = float(_alpha(of_items.sum(0)[None], values, level)[0])
    if all(len(set(item)) == 1 for item in paired):
        counts = of_items.sum((0, 2))
        equal = (counts * (counts - 1)).sum() / (counts.sum() * (counts.sum() - 1))
        return _all_agree(len(paired), float(equal), confidence)
    resampled = _resampled_alphas(of_items, values, level, resamples, np.random.default_rng(seed))
    if not len(resampled):
        return None
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(alpha, min(alpha, float(low)), max(alpha, float(high)), confidence)


def _all_agree(items: int, equal_by_chance: float, confidence: float) -> Interval:
    """For raters without a disagreement."""
    unseen = 1 - proportion(items, items, confidence).low
    return Interval(1.0, max(-1.0, 1 - unseen / (1 - equal_by_chance)), 1.0, confidence)


def _kappa_difference(values: Numbers, level: Level) -> Numbers:
    """d(a, b) of each two values [V, V], the largest 1."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    places = np.arange(len(values)) if level == "ordinal" else values
    apart = np.abs(places[:, None] - places) ** (1 if level == "ordinal" else 2)
    return np.asarray(apart / apart.max(), dtype=np.float64)


def _coincidences(item: Sequence[float | None], values: Numbers) -> Numbers:
    """Ordered pairs of one item's ratings by their values [V, V], weighted 1 / (ratings - 1)."""
    counts = np.bincount(np.searchsorted(values, np.asarray(item, dtype=np.float64)), minlength=len(values))
    return np.asarray((np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1), dtype=np.float64)


def _alpha(coincidences: Numbers, values: Numbers, level: Level) -> Numbers:
    """Alpha of each matrix of coincidences [R, V, V] -> [R]; NaN where all ratings are the same."""
    counts_RV = coincidences.sum(2)
    total_R = counts_RV.sum(1)
    if level == "nominal":
        difference = np.broadcast_to(1.0 - np.eye(len(values)), coincidences.shape)
    else:
        # ratings between two values, the values' own half, are the distance of their middle ranks
        places_RV = (
            counts_RV.cumsum(1) - counts_RV / 2 if level == "ordinal" else np.broadcast_to(values, counts_RV.shape)
        )
        difference = (places_RV[:, :, None] - places_RV[:, None, :]) ** 2
    observed = (coincidences * difference).sum((1, 2)) / total_R
    pairs = counts_RV[:, :, None] * counts_RV[:, None, :]
    expected = (pairs * difference).sum((1, 2)) / (total_R * (total_R - 1))
    return np.asarray(np.divide(observed, expected, out=np.full(len(expected), np.nan), where=expected > 0) * -1 + 1)


def _resampled_alphas(
    of_items: Numbers, values: Numbers, level: Level, resamples: int, generator: np.random.Generator
) -> Numbers:
    """Alphas of items drawn with replacement, without those whose ratings are all the same."""
    n, flat = len(of_items), of_items.reshape(len(of_items), -1)
    at_once = max(1, MEMORY // max(n, flat.shape[1]))
    found = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)
        found.append(_alpha((drawn @ flat).reshape(count, *of_items.shape[1:]), values, level))
    alphas = np.concatenate(found)
    return np.asarray(alphas[~np.isnan(alphas)])
