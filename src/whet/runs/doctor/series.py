"""Numbers in the order of their steps: robust levels and scatter, and values that stand out.

Medians in the place of means: a few wild values must neither hide nor make a finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

SIGMA = 1.4826
"""The median absolute deviation of normal numbers, times this, is their standard deviation."""

SPIKE_SIGMAS, SPIKE_RATIO, SPIKE_WINDOW, SPIKE_LEAST = 10.0, 1.5, 24, 6
"""A spike is so many deviations and times above the last steps; fewer than `SPIKE_LEAST` steps say nothing."""


def finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def scatter(values: Sequence[float]) -> float:
    """Robust standard deviation of the noise: from the differences of neighbours, so that a trend does not count."""
    steps = [b - a for a, b in pairwise(values)]
    return SIGMA * median(abs(step) for step in steps) / math.sqrt(2) if steps else 0.0


def is_spike(value: float, before: Sequence[float]) -> bool:
    """Whether `value` stands out above the values `before` it, of which the last `SPIKE_WINDOW` count."""
    recent = finite(before[-SPIKE_WINDOW:])
    if len(recent) < SPIKE_LEAST:
        return False
    level = median(recent)
    noise = max(scatter(recent), SIGMA * median(abs(v - level) for v in recent), 0.01 * abs(level))
    return value > level + SPIKE_SIGMAS * noise and value > SPIKE_RATIO * level


def spikes(values: Sequence[float]) -> list[int]:
    """The places of values that stand out for one to three steps. A level that stays up is no spike."""
    found = [i for i, value in enumerate(values) if is_spike(value, values[:i])]
    return [i for i in found if _comes_back(values, i)]


def _comes_back(values: Sequence[float], place: int) -> bool:
    level, after = median(finite(values[max(0, place - SPIKE_WINDOW) : place])), values[place + 1 : place + 4]
    return not after or min(after) < (level + values[place]) / 2


def part(values: Sequence[float], begin: float, end: float) -> list[float]:
    """The values from the share `begin` to the share `end` of them; one at least."""
    first = min(int(begin * len(values)), len(values) - 1)
    return list(values[first : max(first + 1, int(end * len(values)))])


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running medians over the last `window` values."""
    return [median(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
