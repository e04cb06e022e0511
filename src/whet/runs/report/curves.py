"""The curves of a run's training, from its metrics. x is the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from whet.pages.charts import Mark, Point, Series, line_chart, running_mean, spans_decades
from whet.pages.numbers import compact, gib
from whet.runs.report.record import Json, Record, finite, is_count, number

SMOOTH = 20
"""A running mean is over one of so many parts of the steps."""


@dataclass(frozen=True)
class Kind:
    """A chart of a training: what it is called, how a value reads, whether single steps are worth their noise."""

    name: str
    values: Callable[[Sequence[Json]], list[Point]]
    show: Callable[[float], str] = compact
    smooth: bool = False
    zero: bool = False
    may_be_log: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    note: str = ""


def logged(name: str) -> Callable[[Sequence[Json]], list[Point]]:
    """What was logged under that name, a point a step that has it."""

    def values(steps: Sequence[Json]) -> list[Point]:
        return [(line["step"], value) for line in steps if (value := number(line.get(name))) is not None]

    return values


def tokens(steps: Sequence[Json]) -> list[Point]:
    """Tokens of each step. Runs that did not log them logged the sum so far, which begins anew when one goes on."""
    points, before = [], 0.0
    for line in steps:
        total, count = finite(line.get("num_tokens")), finite(line.get("tokens"))
        if count is None and total is not None:
            count = total - before if total > before else total
        before = before if total is None else total
        if count is not None and count > 0:
            points.append((line["step"], count))
    return points


def speed(steps: Sequence[Json]) -> list[Point]:
    """Tokens a second, of steps whose time is known."""
    seconds = {line["step"]: finite(line.get("seconds")) for line in steps}
    return [(step, count / taken) for step, count in tokens(steps) if (taken := seconds[step]) and taken > 0]


def held(steps: Sequence[Json]) -> list[Point]:
    """Memory, in GiB."""
    return [(step, value / 2**30) for step, value in logged("memory")(steps)]


KINDS = (
    Kind("Loss", logged("loss"), smooth=True, may_be_log=True),
    Kind("Gradient norm", logged("grad_norm"), smooth=True, may_be_log=True),
    Kind("Learning rate", logged("learning_rate"), zero=True),
    Kind("Tokens a second", speed, smooth=True, zero=True),
    Kind("Memory", held, gib, zero=True),
    Kind("Token accuracy", logged("mean_token_accuracy"), smooth=True),
    Kind("Entropy", logged("entropy"), smooth=True),
    Kind("Chosen over rejected", logged("rewards/accuracies"), smooth=True),
    Kind("Reward margin", logged("rewards/margins"), smooth=True),
)


def training_charts(record: Record, marks: Sequence[Mark] = ()) -> list[Chart]:
    """Those of the kinds above that were logged."""
    charts = []
    for kind in KINDS:
        points = kind.values(record.steps)
        window = _window(points) if kind.smooth else 1
        series = [Series("step" if window > 1 else kind.name.lower(), points, faint=window > 1)]
        if window > 1:
            series.append(Series(f"mean of {window} steps", running_mean(points, window)))
        note = f"Each step, and the mean of {window}." if window > 1 else ""
        charts += _chart(kind, series, note, marks)
    return charts


def overlaid_charts(records: Sequence[Record]) -> list[Chart]:
    """The same kinds with a curve a run, smoothed as each run's own length asks."""
    charts = []
    for kind in KINDS:
        series = []
        for i, record in enumerate(records):
            points = kind.values(record.steps)
            points = running_mean(points, _window(points)) if kind.smooth else points
            series.append(Series(record.id, points, i))
        charts += _chart(kind, series, "Running means." if kind.smooth else "", ())
    by_tokens = [Series(record.id, _by_tokens(record), i) for i, record in enumerate(records)]
    log = spans_decades(y for s in by_tokens for _, y in s.points)
    if svg := line_chart(by_tokens, label="Loss by tokens", x_label="tokens", log=log):
        charts.insert(1, Chart("Loss by tokens learned from", svg, "Running means; fair to unequal batches."))
    return charts


def score_charts(record: Record) -> list[Chart]:
    """How each task's score went through the checkpoints, with its interval where that is known."""
    by_task: dict[str, list[Json]] = {}
    for line in record.lines("eval"):
        if is_count(line.get("step")) and line.get("task") and finite(line.get("mean")) is not None:
            by_task.setdefault(str(line["task"]), []).append(line)
    charts = []
    for task, lines in sorted(by_task.items()):
        lines = sorted(lines, key=lambda line: line["step"])
        if len(lines) > 1:
            ends = [(line["step"], finite(line.get("low")), finite(line.get("high"))) for line in lines]
            band = [(step, low, high) for step, low, high in ends if low is not None and high is not None]
            series = Series(task, logged("mean")(lines), band=band)
            if svg := line_chart([series], label=f"{task} through the checkpoints"):
                charts.append(Chart(task, svg, "With its interval." if band else ""))
    return charts


def numbers(record: Record) -> dict[str, Any]:
    """A training in a few numbers; those that are not known are left out."""
    steps = record.steps
    losses, speeds = logged("loss")(steps), speed(steps)
    known = [loss for _, loss in losses if math.isfinite(loss)]
    window = _window(losses)
    found = {
        "steps": steps[-1]["step"] if steps else None,
        "loss": fmean(known[-window:]) if known else None,
        "window": window,
        "lowest": min(known, default=None),
        "tokens": sum(count for _, count in tokens(steps)) or None,
        "speed": median(value for _, value in speeds) if speeds else None,
        "memory": max((value for _, value in held(steps) if math.isfinite(value)), default=None),
        "seconds": sum(finite(line.get("seconds")) or 0.0 for line in steps) or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _chart(kind: Kind, series: Sequence[Series], note: str, marks: Sequence[Mark]) -> list[Chart]:
    log = kind.may_be_log and spans_decades(y for s in series for _, y in s.points)
    svg = line_chart(series, label=kind.name, show=kind.show, log=log, zero=kind.zero, marks=marks)
    note = f"{note} Logarithmic." if log else note
    return [Chart(kind.name, svg, note.strip())] if svg else []


def _by_tokens(record: Record) -> list[Point]:
    losses = logged("loss")(record.steps)
    smooth = dict(running_mean(losses, _window(losses)))
    points, total = [], 0.0
    for step, count in tokens(record.steps):
        total += count
        if step in smooth:
            points.append((total, smooth[step]))
    return points


def _window(points: Sequence[Point]) -> int:
    return max(1, len(points) // SMOOTH)
