"""Differences on the same items: against independent code, published numbers, and simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from whet.errors import WhetError
from whet.evals.statistics import mcnemar, paired_bootstrap, paired_difference
from whet.evals.statistics.paired import paired_ends

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 1.0])
PAIRS = st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=40)


def zeros_and_ones(better: int, worse: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    same = n - better - worse
    return np.repeat([1.0, 0.0, 1.0], [better, worse, same]), np.repeat([0.0, 1.0, 1.0], [better, worse, same])


def tango(better: int, worse: int, n: int) -> tuple[float, float]:
    """Tango's interval by maximising the likelihood numerically and searching for the score's roots."""

    def score(gain: float) -> float:
        def loss(p: float) -> float:  # p: share of worse pairs
            terms = [(better, p + gain), (worse, p), (n - better - worse, 1 - 2 * p - gain)]
            return -sum(k * math.log(max(share, 1e-300)) for k, share in terms if k)

        bounds = (max(0.0, -gain), (1 - gain) / 2)
        p = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (better - worse - n * gain) / math.sqrt(n * (2 * p + gain * (1 - gain)))

    z, estimate = stats.norm.ppf(0.975), (better - worse) / n
    low = optimize.brentq(lambda gain: score(gain) - z, -0.999, estimate - 1e-6)
    return low, optimize.brentq(lambda gain: score(gain) + z, estimate + 1e-6, 0.999)


@pytest.mark.parametrize(("better", "worse", "n"), [(7, 3, 100), (5, 0, 30), (1, 0, 17), (0, 9, 60), (30, 20, 80)])
def test_zeros_and_ones_have_tangos_interval(better: int, worse: int, n: int) -> None:
    own = paired_difference(*zeros_and_ones(better, worse, n))
    assert (own.low, own.high) == pytest.approx(tango(better, worse, n), abs=1e-5)


def test_a_published_table() -> None:
    """Airway hyper-responsiveness of 21 children, 1 and 7 unequal pairs: Fagerland, Lydersen & Laake 2014, table 3."""
    own = paired_difference(*zeros_and_ones(1, 7, 21))
    assert (round(own.low, 3), round(own.high, 3)) == (-0.517, -0.026)


def test_no_difference_at_all_still_leaves_doubt() -> None:
    """Catches an interval of no width: 30 equal pairs do not show that two models are equal."""
    for interval in (paired_difference, paired_bootstrap):
        found = interval(*zeros_and_ones(0, 0, 30))
        assert found.low < -0.1 < 0.1 < found.high


@given(PAIRS)
@settings(deadline=None, max_examples=30)
def test_who_is_compared_with_whom_only_turns_the_sign(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    one, other = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-7)
    assert -1 <= one.low <= one.estimate + 1e-9
    assert one.estimate - 1e-9 <= one.high <= 1


@given(PAIRS, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=15)
def test_the_order_of_the_items_does_not_matter(pairs: list[tuple[float, float]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (paired_difference(*zip(*some, strict=True)) for some in (pairs, shuffled))
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-9)


def test_many_data_sets_at_once_have_the_intervals_they_have_alone() -> None:
    """Catches a search that stops for all when the first is done."""
    rng = np.random.default_rng(0)
    d = np.where(rng.random((20, 50)) < 0.7, 0, rng.uniform(-1, 1, (20, 50)))
    d[0] = 0
    low, high = paired_ends(d, 0.95)
    for i in range(20):
        alone = paired_difference(np.maximum(d[i], 0), np.maximum(-d[i], 0))
        assert (low[i], high[i]) == pytest.approx((alone.low, alone.high), abs=1e-7)


def test_differences_without_ties_have_students_interval() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.uniform(0.4, 0.9, 400), rng.uniform(0.3, 0.8, 400)
    student = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    for interval in (paired_difference, paired_bootstrap):
        own = interval(ours, theirs)
        assert (own.low, own.high) == pytest.approx((student.low, student.high), abs=0.002)


def test_the_bootstrap_agrees_with_scipys() -> None:
    rng = np.random.default_rng(4)
    difference = np.minimum(rng.exponential(0.2, 300), 1) * (rng.random(300) < 0.6)
    scipys = stats.bootstrap((difference,), np.mean, method="BCa", n_resamples=4000, rng=rng).confidence_interval
    own = paired_bootstrap(difference, np.zeros(300))
    assert (own.low, own.high) == pytest.approx((scipys.low, scipys.high), abs=0.004)


def test_the_bootstrap_repeats_itself_by_its_seed() -> None:
    ours, theirs = np.random.default_rng(6).random((2, 80))
    first = paired_bootstrap(ours, theirs, seed=1)
    assert first == paired_bootstrap(ours, theirs, seed=1)
    assert first != paired_bootstrap(ours, theirs, seed=2)


def test_counting_values_and_drawing_items_resample_alike() -> None:
    """Catches a wrong share in the short way for scores of few values."""
    rng = np.random.default_rng(8)
    d = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], 200, p=[0.05, 0.1, 0.6, 0.15, 0.1])
    shaken = d * (1 - 1e-9 * rng.random(200))
    few = paired_bootstrap(np.maximum(d, 0), np.maximum(-d, 0))
    many = paired_bootstrap(np.maximum(shaken, 0), np.maximum(-shaken, 0))
    assert len(np.unique(shaken)) > 20
    assert (few.low, few.high) == pytest.approx((many.low, many.high), abs=0.004)


@pytest.mark.parametrize("kind", ["zeros and ones", "graded"])
@pytest.mark.parametrize("n", [60, 120])
def test_differences_with_many_ties_are_covered(kind: str, n: int) -> None:
    """Catches Student's interval and the bootstrap without added pairs, which are too short where 8 in 10 are ties."""
    rng = np.random.default_rng(n)
    u = rng.random((600, n))
    size = 1.0 if kind == "zeros and ones" else rng.random((600, n))
    d = np.where(u < 0.15, size, np.where(u < 0.2, -size, 0))
    truth = 0.1 * (1.0 if kind == "zeros and ones" else 0.5)
    low, high = paired_ends(d, 0.95)
    assert 0.925 <= np.mean((low <= truth) & (truth <= high)) <= 0.98


def test_scores_of_different_items_are_refused() -> None:
    for call in (paired_difference, paired_bootstrap, mcnemar):
        with pytest.raises(WhetError, match="3 scores against 2"):
            call([1, 0, 1], [1, 0])
