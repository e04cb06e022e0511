"""Rows that are much longer or shorter than the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from whet.data.doctor.findings import Finding
from whet.data.doctor.rows import Row, places

ENOUGH = 20
FAR = 5.0
"""Robust standard deviations of the log length from which a row is far from the others."""

NARROW = float(np.log(1.25))
"""The least that counts as one deviation, so that rows of nearly one length have no outliers within a few percent."""


def find_lengths(rows: Sequence[Row]) -> Iterator[Finding]:
    """Outliers by the median and the median absolute deviation of log(1 + characters), which they cannot shift.

    1.4826 makes the deviation a standard one where lengths are log-normal. Iglewicz and Hoaglin 1993.
    """
    if len(rows) < ENOUGH:
        return
    logs = np.log1p(np.array([len(row.said) for row in rows], dtype=np.float64))
    median = float(np.median(logs))
    reach = FAR * max(1.4826 * float(np.median(np.abs(logs - median))), NARROW)
    typical = f"characters, where the median is {_characters(median)}."
    yield from _outliers(
        rows,
        logs > median + reach,
        "very long rows",
        f"Rows of more than {_characters(median + reach)} {typical} They may hold several records, or a page's menus.",
        "Look at some: cut what does not belong, or part them.",
    )
    yield from _outliers(
        rows,
        logs < median - reach,
        "very short rows",
        f"Rows of fewer than {_characters(median - reach)} {typical} They may be cut off, or hold only a heading.",
        "Look at some, and leave out those without content.",
    )


def _outliers(rows: Sequence[Row], far: NDArray[np.bool_], check: str, what: str, advice: str) -> Iterator[Finding]:
    found = [row for row, is_far in zip(rows, far.tolist(), strict=True) if is_far]
    if found:
        yield Finding(check, "note", places(found), what, advice)


def _characters(log: float) -> str:
    return f"{np.expm1(log):,.0f}"
