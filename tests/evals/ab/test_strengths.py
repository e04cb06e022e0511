"""Strengths of several systems against known ones."""

from __future__ import annotations

import math

import numpy as np
import pytest

from whet.evals.ab.bradley_terry import PRIOR, bootstrap, log_strengths


def test_two_systems_have_the_log_odds_of_their_wins() -> None:
    wins = np.array([[0.0, 12.0], [30.0, 0.0]])
    assert log_strengths(wins)[1] == pytest.approx(math.log((30 + PRIOR) / (12 + PRIOR)), abs=1e-6)


def test_known_strengths_are_found_again() -> None:
    """Catches wins read along the wrong axis, and an order that is turned round."""
    strengths = np.array([1.0, 2.0, 0.5, 4.0])
    wins = 100_000 * strengths[:, None] / (strengths[:, None] + strengths)
    np.fill_diagonal(wins, 0)
    assert log_strengths(wins) == pytest.approx(np.log(strengths), abs=1e-3)


def test_a_system_that_always_wins_has_a_finite_strength() -> None:
    assert np.isfinite(log_strengths(np.array([[0.0, 0, 0], [9, 0, 9], [9, 0, 0]]))).all()


def test_the_bootstrap_spreads_like_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    by_item = np.zeros((200, 2, 2))
    won = rng.random(200) < 0.6
    by_item[won, 1, 0] = by_item[~won, 0, 1] = 1
    rate = won.mean()
    spread = bootstrap(by_item, resamples=1000)[:, 1].std()
    assert spread == pytest.approx(math.sqrt(1 / (200 * rate * (1 - rate))), rel=0.1)
