"""Charts: what is drawn lies in the picture, spikes stay, means do not lag, numbers on the axes are round."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from whet.pages.charts import (
    BUCKETS,
    HEIGHT,
    NOTES,
    WIDTH,
    Mark,
    Series,
    line_chart,
    log_ticks,
    running_mean,
    spans_decades,
    thinned,
    ticks,
)
from whet.pages.numbers import compact, duration

Y = st.floats(-1e30, 1e30) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
CURVE = st.lists(Y, min_size=1, max_size=40).map(lambda values: [(i + 1, v) for i, v in enumerate(values)])


def numbers(svg: str) -> list[float]:
    """Every coordinate of the picture."""
    root = ElementTree.fromstring(svg)
    names = ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy", "width", "height")
    found = [float(node.attrib[name]) for node in root.iter() for name in names if name in node.attrib]
    paths = [node.attrib["d"] for node in root.iter() if "d" in node.attrib]
    return found + [float(number) for path in paths for number in re.findall(r"-?[\d.]+(?:e-?\d+)?|nan|inf", path)]


@given(st.lists(CURVE, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_whatever_is_drawn_lies_in_the_picture(curves: list[list[tuple[float, float]]], log: bool, zero: bool) -> None:
    """Catches a curve outside of its frame, "nan" in a path, and a division by an axis of no length."""
    series = [Series(f"run {i}", curve, i, faint=i == 0) for i, curve in enumerate(curves)]
    svg = line_chart(series, label="a & b < c", log=log, zero=zero, marks=[Mark(2, "<b>", "warn")])
    values = [y for curve in curves for _, y in curve if math.isfinite(y) and (y > 0 or not log)]
    if svg is None:
        assert not values
        return
    for number in numbers(str(svg)):
        assert math.isfinite(number)
        assert -WIDTH / 4 <= number <= max(WIDTH, HEIGHT) + 1


@given(st.lists(Y, max_size=5 * BUCKETS))
def test_thinning_keeps_the_lowest_and_the_highest(values: list[float]) -> None:
    """Catches a spike of one step that a picture of thousands does not show."""
    points = list(enumerate(values))
    kept = thinned([(float(x), y) for x, y in points])
    assert len(kept) <= 3 * BUCKETS
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    finite = [y for y in values if math.isfinite(y)]
    if finite:
        assert {min(finite), max(finite)} <= {y for _, y in kept}


def test_a_spike_among_a_hundred_thousand_steps_is_drawn() -> None:
    points = [(float(i), 50.0 if i == 77_777 else 1.0) for i in range(100_000)]
    svg = str(line_chart([Series("loss", points)], label="loss"))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", svg)]
    assert sum(y < HEIGHT / 4 for y in heights) == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 80))
def test_a_running_mean_stays_within_its_values_and_has_them_all(values: list[float], window: int) -> None:
    points = [(float(i), y) for i, y in enumerate(values)]
    means = running_mean(points, window)
    assert [x for x, _ in means] == [x for x, _ in points]
    room = 1e-6 * max(map(abs, values)) + 1e-9
    assert all(min(values) - room <= y <= max(values) + room for _, y in means)
    if window == 1:
        assert [y for _, y in means] == pytest.approx(values, abs=1e-6)


def test_a_running_mean_does_not_lag() -> None:
    """Catches a curve that shows a fall of the loss later than it was."""
    line = [(float(i), float(i)) for i in range(100)]
    means = dict(running_mean(line, 9))
    assert all(means[x] == pytest.approx(x) for x in range(4, 95))


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.integers(2, 8))
def test_ticks_are_few_and_on_the_axis(low: float, length: float, most: int) -> None:
    high = low + length
    assume(high - low > 1e-6 * max(abs(low), abs(high)))  # finer than the digits of a tick
    found = ticks(low, high, most)
    assert len(found) <= most
    room = 1e-6 * (high - low) + 1e-9 * max(abs(low), abs(high))
    assert all(low - room <= tick <= high + room for tick in found)
    assert found == sorted(set(found))


@given(st.floats(1e-12, 1e12), st.floats(1.2, 1e12))
def test_log_ticks_are_few_and_on_the_axis(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert len(found) <= 6
    assert all(low <= tick <= low * ratio for tick in found)
    assert found == sorted(set(found))
    assert found or ratio < 10


def test_round_numbers() -> None:
    assert ticks(0, 400, 6) == [0, 100, 200, 300, 400]
    assert ticks(0.85, 3.1) == [1, 1.5, 2, 2.5, 3]
    assert log_ticks(0.5, 20_000) == [1, 10, 100, 1000, 10_000]
    assert log_ticks(2, 60) == [2, 5, 10, 20, 50]


def test_a_logarithmic_axis_is_for_what_spans_decades() -> None:
    assert spans_decades([1.0, 1.1, 1.2, 500.0])
    assert not spans_decades([1.0, 1.1, 1.2, 5.0])
    assert not spans_decades([0.0, 1.1, 1.2, 500.0])
    assert not spans_decades([math.nan, math.inf])


def test_notes_are_few_and_tell_of_the_curves_in_front() -> None:
    points = [(float(i), i / 1000) for i in range(1000)]
    svg = str(line_chart([Series("step", points, faint=True), Series("mean of 50", points)], label="loss"))
    notes = re.findall(r'<g class="spot">.*', svg)
    assert len(notes) == NOTES
    assert all("mean of 50" in note for note in notes)
    assert not any(">step 0" in note for note in notes[1:])


def test_a_note_of_long_names_lies_in_the_picture() -> None:
    """Catches a note cut off at the left: the run's digest, at a name's end, tells which is which."""
    names = [f"a-very-long-name-of-a-recipe-for-a-support-desk-{i}{i}{i}{i}" for i in range(8)]
    svg = str(
        line_chart([Series(name, [(float(x), x + 1.0) for x in range(9)], i) for i, name in enumerate(names)], label="")
    )
    boxes = re.findall(r'class="tip" x="(-?[\d.]+)" y="[\d.]+" width="(\d+)"', svg)
    assert len(boxes) == 9
    assert all(float(left) >= 0 and float(left) + float(width) <= WIDTH for left, width in boxes)
    assert "support-desk-7777" in svg


def test_numbers_as_people_read_them() -> None:
    told = [0, 0.00018, 1e-4, 0.0123, 1.2345678, 412, 9999, 21_431, 6_390_000, 2.5e9, -0.5, math.nan]
    assert [compact(number) for number in told] == [
        "0", "1.8e-4", "1e-4", "0.0123", "1.235", "412", "9999", "21.4k", "6.39M", "2.5G", "-0.5", "nan",
    ]  # fmt: skip
    assert [duration(s) for s in (4.123, 59.99, 200, 7502)] == ["4.12 s", "60 s", "3 min 20 s", "2 h 05 min"]
