"""The few distribution functions that the statistics need, typed; scipy.special has no types of its own."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # type: ignore[import-untyped]

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]


def normal_quantile(p: float) -> float:
    """z with P(Z < z) = p."""
    return float(special.ndtri(p))


def t_quantile(p: float, df: float) -> float:
    """t with P(T < t) = p, for Student's T with df degrees of freedom."""
    return float(special.stdtrit(df, p))


def t_upper(t: float, df: float) -> float:
    """P(T > t), for Student's T with df degrees of freedom."""
    return float(special.stdtr(df, -t))


def binomial_at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial(n, p)."""
    return float(special.bdtr(k, n, p))


def binomial_pmf(k: ArrayLike, n: int, p: float) -> Floats:
    """P(X = k) for X binomial(n, p), elementwise over k; p = 0 and p = 1 are allowed."""
    k = np.asarray(k, dtype=np.float64)
    choose = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return _floats(np.exp(choose + special.xlogy(k, p) + special.xlog1py(n - k, -p)))


def binomial_at_least(k: ArrayLike, n: ArrayLike, p: float) -> Floats:
    """P(X >= k) for X binomial(n, p), elementwise; 1 where k <= 0 and 0 where k > n."""
    k, n = np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64)
    inside = special.betainc(np.maximum(k, 1), np.maximum(n - k + 1, 1), p)  # I_p(k, n - k + 1)
    return _floats(np.where(k <= 0, 1.0, np.where(k > n, 0.0, inside)))


def _floats(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)
