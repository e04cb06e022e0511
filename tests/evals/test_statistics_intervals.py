"""Intervals for one model: against statsmodels and scipy, at the edges, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from whet.errors import WhetError
from whet.evals.statistics import Interval, mean, over_seeds, proportion, ratio
from whet.evals.statistics.means import mean_ends

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@pytest.mark.parametrize("n", [1, 7, 30, 400])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_a_rate_has_the_interval_that_statsmodels_gives_it(n: int, confidence: float) -> None:
    for successes in range(n + 1):
        own = proportion(successes, n, confidence)
        low, high = proportion_confint(successes, n, 1 - confidence, method="wilson")
        assert (own.low, own.high) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("successes", [0, 1, 2, 15, 28, 29, 30])
def test_the_score_method_is_wilsons_interval_on_zeros_and_ones(successes: int) -> None:
    """Catches a wrong weight for the end of the support that no score reached."""
    scores = np.repeat([1.0, 0.0], [successes, 30 - successes])
    wilson = proportion(successes, 30)
    low, high = mean_ends(scores[None], 0.95)
    assert (low[0], high[0]) == pytest.approx((wilson.low, wilson.high), abs=1e-8)
    assert mean(scores) == wilson


def test_equal_scores_still_leave_doubt() -> None:
    """Catches an interval of no width, which resampling equal scores gives."""
    found = mean([0.7] * 20)
    assert found.low < 0.65 < found.estimate < 0.74 < found.high


def test_many_spread_scores_have_students_interval() -> None:
    scores = np.random.default_rng(0).beta(4, 3, 500)
    student = stats.ttest_1samp(scores, 0.5).confidence_interval(0.95)
    own = mean(scores)
    assert (own.low, own.high) == pytest.approx((student.low, student.high), abs=0.001)


@given(SCORES)
@settings(deadline=None, max_examples=30)
def test_an_interval_holds_its_estimate_and_stays_on_the_scale(scores: list[float]) -> None:
    wide, narrow = mean(scores, 0.99), mean(scores, 0.8)
    assert 0 <= wide.low <= narrow.low + 1e-9
    assert narrow.low - 1e-9 <= narrow.estimate <= narrow.high + 1e-9
    assert narrow.high - 1e-9 <= wide.high <= 1


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.1), (0.9, 0.99)])
def test_rates_near_the_ends_are_covered(low: float, high: float) -> None:
    """Catches the Wald interval, which holds a rate near 1 in 4 of 5 cases."""
    rng = np.random.default_rng(5)
    rates = rng.uniform(low, high, 2000)
    found = [proportion(int(k), 50) for k in rng.binomial(50, rates)]
    held = np.mean([i.low <= rate <= i.high for i, rate in zip(found, rates, strict=True)])
    assert 0.935 <= held <= 0.975


@pytest.mark.parametrize("n", [30, 100])
def test_graded_scores_that_are_nearly_all_one_are_covered(n: int) -> None:
    """Catches Student's interval and the plain bootstrap: both hold the truth here in under 90%."""
    rng = np.random.default_rng(n)
    scores = np.where(rng.random((1000, n)) < 0.85, 1.0, rng.random((1000, n)))
    low, high = mean_ends(scores, 0.95)
    assert 0.92 <= np.mean((low <= 0.925) & (high >= 0.925)) <= 0.98


def test_a_ratio_over_ones_is_students_interval_of_a_mean() -> None:
    rise = np.random.default_rng(1).normal(0.1, 1, 40)
    student = stats.ttest_1samp(rise, 0).confidence_interval(0.9)
    own = ratio(rise, np.ones(40), 0.9)
    assert (own.low, own.high) == pytest.approx((student.low, student.high), abs=1e-12)


def test_long_texts_weigh_more_in_a_ratio() -> None:
    assert ratio([10.0, 900.0], [10.0, 300.0], 0.95).estimate == pytest.approx(910 / 310)


def test_seeds_have_students_interval_over_their_means() -> None:
    means = [0.71, 0.68, 0.74]
    student = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    own = over_seeds(means)
    assert (own.low, own.high) == pytest.approx((student.low, student.high), abs=1e-12)


def test_seeds_on_shared_items_count_the_draw_of_the_items() -> None:
    """Catches items taken to be fixed: seeds that agree on 20 prompts say little of other prompts."""
    rng = np.random.default_rng(2)
    held = []
    for _ in range(600):
        x = 0.5 + rng.normal(0, 0.03, (4, 1)) + rng.normal(0, 0.2, (1, 60)) + rng.normal(0, 0.1, (4, 60))
        found = over_seeds(x)
        held.append(found.low <= 0.5 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.985


@pytest.mark.parametrize("runs", [[0.7], [[0.7, 0.6]], [], [[]], [0.7, math.nan]])
def test_one_seed_says_nothing_of_another(runs: list[float]) -> None:
    with pytest.raises(WhetError, match="another seed"):
        over_seeds(runs)


@pytest.mark.parametrize("scores", [[], [0.5, math.nan], [1.2], [-0.1], [[0.5]], ["a"]])
def test_what_is_no_row_of_scores_is_refused(scores: list[float]) -> None:
    """Catches a NaN that becomes an interval of NaN, on which every comparison is false."""
    with pytest.raises(WhetError):
        mean(scores)


def test_counts_and_confidences_that_cannot_be_are_refused() -> None:
    for call in (
        lambda: proportion(5, 4),
        lambda: proportion(0, 0),
        lambda: proportion(1, 2, 95),
        lambda: mean([1], 0),
    ):
        with pytest.raises(WhetError):
            call()


def test_points_are_written_with_their_sign() -> None:
    assert Interval(0.06, -0.0121, 0.108, 0.95).points(signed=True) == "+6.0 (-1.2 to +10.8)"
