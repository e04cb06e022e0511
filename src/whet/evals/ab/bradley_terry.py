"""Bradley-Terry: one strength for each of several systems, from wins between any two of them.

    P(i is preferred to j) = s_i / (s_i + s_j)

A tie counts as half a win for each. Maximum likelihood by minorization: s_i <- wins_i / sum_j n_ij / (s_i + s_j).
Source: Hunter 2004, MM algorithms for generalized Bradley-Terry models, Annals of Statistics 32(1).
Shapes: wins [..., S, S], S systems; wins[i, j] times i was preferred to j.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

PRIOR = 0.5
"""Wins each way that every pair starts with, so that a system which always wins has a finite strength."""


def log_strengths(wins: Floats, *, rounds: int = 2000, tolerance: float = 1e-9) -> Floats:
    """Natural logarithms of the strengths [..., S], the first system's being 0."""
    systems = wins.shape[-1]
    wins = wins + PRIOR * (1 - np.eye(systems))
    games = wins + wins.swapaxes(-1, -2)
    won = wins.sum(-1)
    strengths = np.ones(wins.shape[:-1])
    for _ in range(rounds):
        rivals = (games / (strengths[..., :, None] + strengths[..., None, :])).sum(-1)
        better = won / rivals
        better /= better.mean(-1, keepdims=True)
        moved = np.abs(better - strengths).max()
        strengths = better
        if moved < tolerance:
            break
    return np.log(strengths / strengths[..., :1])


def bootstrap(wins_by_item: Floats, *, resamples: int = 2000, seed: int = 0) -> Floats:
    """Log-strengths [resamples, S] with the items of wins_by_item [items, S, S] drawn again, with replacement."""
    items = len(wins_by_item)
    draws = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples)
    return log_strengths(np.tensordot(draws.astype(np.float64), wins_by_item, axes=1))
