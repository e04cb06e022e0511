"""Kappa and alpha against published values, statsmodels and scikit-learn; their intervals against simulation."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.evals.agreement import Level, cohen_kappa, krippendorff_alpha

X = None
# Krippendorff 2011, example C: four observers, twelve units, with missing ratings.
OBSERVERS: list[list[int | None]] = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
    [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
]
UNITS = [list(unit) for unit in zip(*OBSERVERS, strict=True)]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_has_the_published_values(level: Level, alpha: float) -> None:
    """Catches missing ratings that count, units weighted by the wrong number of pairs, and a wrong metric."""
    found = krippendorff_alpha(UNITS, level=level)
    assert found is not None
    assert found.estimate == pytest.approx(alpha, abs=0.0005)
    assert found.low < found.estimate < found.high <= 1


@pytest.mark.parametrize(("level", "weights"), [("nominal", None), ("ordinal", "linear"), ("interval", "quadratic")])
def test_kappa_equals_scikit_learns_and_its_interval_statsmodels(level: Level, weights: Any) -> None:
    from sklearn.metrics import cohen_kappa_score
    from statsmodels.stats.inter_rater import cohens_kappa

    generator = np.random.default_rng(3)
    one = generator.integers(1, 6, 80)
    other = np.clip(one + generator.integers(-1, 2, 80), 1, 5)
    found = cohen_kappa(one.tolist(), other.tolist(), level=level)
    assert found is not None
    assert found.estimate == pytest.approx(cohen_kappa_score(one, other, weights=weights), abs=1e-12)
    table = np.zeros((5, 5))
    np.add.at(table, (one - 1, other - 1), 1)
    theirs = cohens_kappa(table, wt={None: None, "linear": "linear", "quadratic": "quadratic"}[weights])
    assert (found.low, found.high) == pytest.approx((theirs.kappa_low, theirs.kappa_upp), abs=1e-4)


def test_full_agreement_on_few_items_is_not_certainty() -> None:
    """Catches an interval of [1, 1] from five items, which the bootstrap and the large-sample variance both give."""
    ratings = [1.0, 2.0, 3.0, 1.0, 2.0]
    kappa = cohen_kappa(ratings, ratings)
    alpha = krippendorff_alpha([[r, r] for r in ratings])
    for found in (kappa, alpha):
        assert found is not None
        assert (found.estimate, found.high) == (1.0, 1.0)
        assert found.low < 0.7


def test_agreement_without_a_choice_is_none() -> None:
    """Catches 0 / 0: raters who only ever gave one grade show nothing about their agreement."""
    assert cohen_kappa([3, 3, 3], [3, 3, 3]) is None
    assert krippendorff_alpha([[3, 3], [3, 3]]) is None
    assert krippendorff_alpha([[1], [2], [None, 3]]) is None
    assert krippendorff_alpha([]) is None


@pytest.mark.parametrize("measure", ["kappa", "alpha"])
def test_intervals_cover_the_true_value(measure: str) -> None:
    """Two raters who see a grade of 1 to 4 rightly in three cases of four and guess else, at 60 items: of 300 nominal
    95% intervals 91% to 98% hold the true agreement, which is (3/4)^2 beyond chance. Catches a variance that forgets
    the marginals, and a bootstrap of ratings in place of items."""
    generator = np.random.default_rng(5)
    true, covered = 0.75**2, 0
    for _ in range(300):
        truth = generator.integers(1, 5, 60)
        raters = [np.where(generator.random(60) < 0.75, truth, generator.integers(1, 5, 60)) for _ in range(2)]
        one, other = (rater.tolist() for rater in raters)
        if measure == "kappa":
            found = cohen_kappa(one, other)
        else:
            found = krippendorff_alpha(list(zip(one, other, strict=True)), level="nominal", resamples=300)
        assert found is not None
        covered += found.low <= true <= found.high
    assert 0.91 <= covered / 300 <= 0.98


RATINGS = st.lists(st.lists(st.none() | st.integers(1, 5), min_size=1, max_size=4), max_size=12)


@given(RATINGS, st.sampled_from(["nominal", "ordinal", "interval"]))
def test_alpha_is_in_its_interval_whatever_the_ratings(items: list[list[int | None]], level: Level) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by nothing that NumPy only warns of
        found = krippendorff_alpha(items, level=level, resamples=50)
        shuffled = krippendorff_alpha([item[::-1] for item in reversed(items)], level=level, resamples=50)
    if found is None:
        assert shuffled is None
        return
    assert shuffled is not None
    assert found.estimate == pytest.approx(shuffled.estimate)
    assert found.low <= found.estimate <= found.high <= 1 + 1e-12
