"""Tests, corrections and power: against statsmodels and by enumeration."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from tests.evals.test_statistics_paired import zeros_and_ones
from whet.errors import WhetError
from whet.evals.statistics import describe_power, detectable_gain, excess_p, holm, mcnemar, power_of_gain, sample_size
from whet.evals.statistics.tests import chance, tango_z, thresholds, unconditional_p


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (6, 0), (5, 5), (12, 3), (2, 17)])
def test_mcnemar_gives_the_p_of_statsmodels(better: int, worse: int) -> None:
    expected = contingency_tables.mcnemar([[9, better], [worse, 4]], exact=True).pvalue if better + worse else 1.0
    assert mcnemar(*zeros_and_ones(better, worse, 40)) == pytest.approx(expected)


def test_mcnemar_is_for_zeros_and_ones() -> None:
    with pytest.raises(WhetError, match="scores of 0 and 1"):
        mcnemar([0.5, 1], [0, 1])


@pytest.mark.parametrize("p", [[0.03], [0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.001, 1.0, 0.0], [0.6, 0.9], [0.0] * 3])
def test_holm_gives_the_p_values_of_statsmodels(p: list[float]) -> None:
    own = holm({str(i): value for i, value in enumerate(p)})
    assert list(own.values()) == pytest.approx(list(multipletests(p, method="holm")[1]))
    assert list(own) == [str(i) for i in range(len(p))]


def outcomes(n: int) -> list[tuple[int, int]]:
    return [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]


@pytest.mark.parametrize(("n", "limit"), [(12, 0.0), (17, 0.01), (15, 0.1), (15, -0.1)])
def test_the_exact_test_errs_no_more_often_than_it_says(n: int, limit: float) -> None:
    """Catches Tango's asymptotic decision: at 17 items and a limit of 1 point it ships in 16% where it says 2.5%."""
    passing = [(b, c) for b, c in outcomes(n) if excess_p(*zeros_and_ones(b, c, n), limit) <= 0.025]
    for unequal in np.linspace(max(abs(limit), 0.001), 1, 25):
        shares = [(unequal + limit) / 2, (unequal - limit) / 2, 1 - unequal]
        shares = [min(max(share, 0.0), 1.0) for share in shares]
        rate = sum(stats.multinomial.pmf([b, c, n - b - c], n, shares) for b, c in passing)
        assert rate <= 0.0251


@pytest.mark.parametrize("limit", [0.0, 0.05, -0.08])
def test_thresholds_and_chances_are_those_of_counting_every_outcome(limit: float) -> None:
    n, z, gain, unequal = 20, 1.5, 0.15, 0.4
    region = thresholds(z, n, limit)
    reached = [(b, c) for b, c in outcomes(n) if tango_z(b, c, n, limit) >= z - 1e-9]
    assert all((b >= region[b + c]) == ((b, c) in reached) for b, c in outcomes(n))
    shares = [(unequal + gain) / 2, (unequal - gain) / 2, 1 - unequal]
    counted = sum(stats.multinomial.pmf([b, c, n - b - c], n, shares) for b, c in reached)
    assert chance(region, n, gain, unequal) == pytest.approx(counted, abs=1e-9)


def test_a_p_value_falls_as_the_statistic_rises() -> None:
    p = [unconditional_p(z, 50, 0.02) for z in (-math.inf, -1.0, 0.0, 1.0, 2.0, 3.0, math.inf)]
    assert p[0] == pytest.approx(1)
    assert all(a >= b for a, b in pairwise(p))


def test_graded_scores_are_tested_near_students_way() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(0.3, 0.9, 200), rng.uniform(0.2, 0.9, 200)
    expected = stats.ttest_rel(ours, theirs, alternative="greater").pvalue
    assert excess_p(ours, theirs) == pytest.approx(expected, abs=0.01)


def test_one_large_difference_is_no_proof() -> None:
    """Catches a ship on three items of 400, however small their differences are."""
    for size in (1.0, 0.3, 0.01):
        ours = np.full(400, 0.5)
        ours[:3] += size / 2
        theirs = np.full(400, 0.5)
        theirs[:3] -= size / 2
        assert excess_p(ours, theirs) > 0.05


@pytest.mark.parametrize("gain", [0.02, 0.03, 0.04])
def test_power_at_many_items_is_that_of_statsmodels(gain: float) -> None:
    spread = math.sqrt(0.2 - gain**2)
    expected = TTestPower().power(gain / spread, 2000, 0.025, alternative="larger")
    assert power_of_gain(gain, 2000, agreement=0.8) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("n", [40, 150, 600])
def test_the_detectable_gain_is_just_detectable(n: int) -> None:
    gain = detectable_gain(n, baseline_rate=0.4)
    assert power_of_gain(gain, n, agreement=0.8) >= 0.8 > power_of_gain(gain - 0.002, n, agreement=0.8)


def test_the_sample_size_is_just_enough() -> None:
    n = sample_size(0.2, agreement=0.7)
    assert power_of_gain(0.2, n, agreement=0.7) >= 0.8 > power_of_gain(0.2, round(0.9 * n), agreement=0.7)
    assert sample_size(0.2, agreement=0.7, over=0.06) > 1.5 * n


def test_no_room_no_gain() -> None:
    """Catches a promise of 18 points where the baseline has 95 of 100."""
    assert detectable_gain(40, baseline_rate=0.95) == math.inf
    assert describe_power(40, baseline_rate=0.95).startswith("With 40 prompts no gain can be seen")
    assert describe_power(1, baseline_rate=0.0).startswith("With 1 prompt no gain can be seen")


def test_power_is_said_in_plain_words() -> None:
    points = math.ceil(100 * detectable_gain(100, baseline_rate=0.5, agreement=0.9))
    said = describe_power(100, baseline_rate=0.5, agreement=0.9)
    assert said.startswith(f"With 100 prompts a gain under {points} points cannot be seen")


def test_a_gain_that_is_required_already_takes_no_number_of_items() -> None:
    with pytest.raises(WhetError, match="no number of items"):
        sample_size(0.05, over=0.05)
