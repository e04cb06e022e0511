"""The live view: what it says, that it fits, and that it leaves the terminal as it was."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from whet.runs import live
from whet.runs.live import BLOCKS, PLAIN, Curve, LiveView, Progress, clock_text, draw, sparkline

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=300)


def shown(progress: Progress, *, now: float, width: int = 100, blocks: str = BLOCKS) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    for part in draw(progress, now, width, blocks, "GPU 17.9 of 139.8 GiB"):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def progress(steps: int, total: int = 100) -> Progress:
    """Two seconds a step, of which one and a half are the step's own; 3,000 tokens each."""
    found = Progress(total=total)
    for step in range(1, steps + 1):
        loss = 3.0 - step / 50
        found.add(step, loss, 2.0 * step, learning_rate=1e-4, grad_norm=0.25, seconds=1.5, tokens=3000.0)
    return found


def test_what_is_said() -> None:
    lines = shown(progress(40), now=80.0)
    assert len(lines) == 4
    assert "40/100" in lines[0]
    assert "ETA 0:02:00" in lines[0]
    assert "2.9800 first" in lines[1]
    assert lines[2].split()[0] == "2.2000"
    assert "2.2000 lowest" in lines[2]
    assert lines[3].split("    ") == [
        "  2,000 tok/s", "1.50 s a step", "GPU 17.9 of 139.8 GiB", "rate 1.0e-04", "gradient norm 0.25",
    ]  # fmt: skip


def test_the_time_left_goes_down_between_steps_and_stops_at_nothing() -> None:
    """Catches a clock that stands still during a long step, and one that counts below zero."""
    found = progress(40)
    assert found.left(80.0) == 120.0
    assert found.left(81.0) == 119.0
    assert found.left(1000.0) == 0.0
    assert progress(1).left(2.0) is None


def test_before_the_first_step_nothing_is_made_up() -> None:
    lines = shown(Progress(total=10), now=5.0)
    assert "0/10" in lines[0]
    assert "ETA" not in lines[0]
    assert "tok/s" not in " ".join(lines)


def test_a_run_whose_tokens_are_not_counted_says_no_speed() -> None:
    found = Progress(total=10)
    found.add(1, 2.0, 1.0, seconds=0.5)
    text = " ".join(shown(found, now=1.0))
    assert "tok/s" not in text
    assert "0.50 s a step" in text


@given(VALUES, st.integers(20, 200))
def test_no_line_is_wider_than_the_terminal(values: list[float], width: int) -> None:
    """Catches a display that wraps, and so scrolls the terminal at each refresh."""
    found = Progress(total=10**6)
    for i, value in enumerate(values):
        found.add(i, value, float(i), learning_rate=1e-4, grad_norm=abs(value), seconds=0.1, tokens=1e6)
    for line in shown(found, now=float(len(values)), width=width):
        assert len(line) <= width


@given(VALUES, st.integers(1, 120), st.integers(1, 3), st.sampled_from([BLOCKS, PLAIN]))
def test_a_sparkline_is_as_wide_as_asked_and_shows_the_order(
    values: list[float], width: int, height: int, blocks: str
) -> None:
    lines = sparkline(values, width, height, blocks)
    assert len(lines) == height
    assert {len(line) for line in lines} == {min(len(values), width)}
    assert all(set(line) <= set(blocks) for line in lines)
    if 1 < len(values) <= width and max(values) > min(values):
        tall = [sum(blocks.index(line[i]) for line in lines) for i in range(len(values))]
        assert tall[values.index(max(values))] == max(tall) == height * (len(blocks) - 1)
        assert tall[values.index(min(values))] == min(tall) == 1


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=200), st.integers(1, 5))
def test_a_curve_stays_short_and_finite(values: list[float], half: int) -> None:
    """Catches memory, and a drawing's cost, that grow with the steps; and a NaN that empties the picture."""
    curve = Curve(size=2 * half)
    for value in values:
        curve.add(value)
    assert len(curve.points) < 2 * half
    assert all(not math.isnan(point) for point in curve.points)


def test_a_curve_keeps_the_means() -> None:
    curve = Curve(size=4)
    for value in range(8):
        curve.add(float(value))
    assert curve.points == [1.5, 5.5]
    assert curve.every == 4


def test_the_terminal_is_left_as_it_was() -> None:
    """Catches a cursor that stays hidden, and a display that outlives its training."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    view = LiveView(console, clock=lambda: 1.0)
    view.stop()  # before it began: training failed to start
    view.start(total=3)
    view.step(1, 2.0, seconds=0.1, tokens=10.0)
    view.stop()
    view.stop()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "2.0000" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert not console._live_stack


def test_a_terminal_of_ascii_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an encoding error that would end the training on a terminal of the C locale."""
    monkeypatch.setattr(live, "memory_text", lambda: "")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, force_terminal=True, width=80)
    view = LiveView(console, clock=lambda: 1.0)
    view.start(total=3)
    view.step(1, 2.0)
    view.step(2, 1.0)
    view.stop()
    file.flush()
    assert b"1.0000" in file.buffer.getvalue()  # type: ignore[attr-defined]


def test_refreshed_four_times_a_second_at_most() -> None:
    assert LiveView(Console(quiet=True))._live.refresh_per_second <= 4


def test_clock_text() -> None:
    assert [clock_text(s) for s in (0, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]
