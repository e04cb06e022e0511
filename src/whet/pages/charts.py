"""Line charts as inline SVG: colours from the page's style, so that they follow dark mode and print; no scripts.

Where the pointer is, a chart tells the values there: the style shows the one of its hidden notes that is under it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby

from markupsafe import Markup

from whet.pages.numbers import compact

WIDTH, HEIGHT = 480.0, 216.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 12.0, 30.0
"""The frame round the curves, in the units of the picture."""

BUCKETS = 240
"""Columns of a curve. Of more points than that, a column keeps its lowest and highest, so no spike is lost."""

NOTES = 60
"""Places at which the pointer finds values."""

COLOURS = 8
"""Colours of the style, .c0 to .c7."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve. A value that is no finite number leaves a gap.

    points: x rising, y. colour: its number in the style. faint: drawn behind the others, and not told of by notes.
    band: x, low, high of an interval round the curve.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """Something that happened at x. level: alarm or warn, as the style names it, or nothing."""

    x: float
    text: str
    level: str = ""


@dataclass(frozen=True)
class Axes:
    """Where values lie in the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high, at = (self._scaled(v) for v in (self.y_low, self.y_high, value))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.y_low)) if self.log else value


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "optimizer step",
    show: Callable[[float], str] = compact,
    log: bool = False,
    zero: bool = False,
    marks: Sequence[Mark] = (),
) -> Markup | None:
    """The picture, or None when no curve has a finite value.

    label: what it shows, for those who can't see it. show: a value in words. zero: the axis begins at 0.
    """
    series = [replace(s, points=thinned(_above_zero(s.points) if log else s.points)) for s in series]
    axes = _axes(series, log, zero)
    if axes is None:
        return None
    parts = [
        *_grid(axes, x_label, show),
        *(_mark(axes, mark) for mark in marks if axes.x_low <= mark.x <= axes.x_high),
        *(part for curve in sorted(series, key=lambda s: not s.faint) for part in _curve(axes, curve)),
        *_notes(axes, [curve for curve in series if not curve.faint] or series, x_label, show),
    ]
    svg = '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">\n{}\n</svg>'
    return Markup(svg).format(f"{WIDTH:g}", f"{HEIGHT:g}", label, Markup("\n").join(parts))


def _above_zero(points: Sequence[Point]) -> list[Point]:
    """The points, with gaps in the place of those that a logarithmic axis has no place for."""
    return [(x, y if y > 0 else math.nan) for x, y in points]


def spans_decades(values: Iterable[float], ratio: float = 30.0) -> bool:
    """Whether a logarithmic axis shows more: all finite values are above 0, and the highest is far above the middle."""
    finite = sorted(value for value in values if math.isfinite(value))
    return len(finite) > 2 and finite[0] > 0 and finite[-1] > ratio * finite[len(finite) // 2]


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of each y with its neighbours, `window` values in all, fewer at the ends. Not finite ones are left out.

    It is centred, so that it does not lag behind what it smooths.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0, *accumulate(y for _, y in finite)]
    before, means = (window - 1) // 2, []
    for i, (x, _) in enumerate(finite):
        first, last = max(0, i - before), min(len(finite), i - before + window)
        means.append((x, (sums[last] - sums[first]) / (last - first)))
    return means


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most two points a column: the lowest and the highest, in their order. What is not finite stays, as a gap."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept: list[Point] = []
    for _, column in groupby(enumerate(points), key=lambda item: item[0] * BUCKETS // len(points)):
        here = [point for _, point in column]
        finite = [point for point in here if math.isfinite(point[1])]
        extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        gaps = [point for point in here if not math.isfinite(point[1])][:1]
        kept += sorted([*extremes, *gaps], key=lambda p: p[0])
    return kept


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from `low` to `high`, `most` of them or fewer."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or where fewer than two lie between `low` and `high`, 1, 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) > 1:
            break
    return found[:: max(1, math.ceil(len(found) / 6))]


def _axes(series: Sequence[Series], log: bool, zero: bool) -> Axes | None:
    points = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    points += [(x, y) for s in series for x, *ends in s.band for y in ends]
    if not points or (log and min(y for _, y in points) <= 0):  # the end of a band may be below 0
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        flat = high - low <= 1e-9 * max(abs(low), abs(high))
        room = abs(high) * 0.1 or 1.0 if flat else (high - low) * 0.06
        low, high = (0.0 if zero and low >= 0 else low - room), high + room
    x_low, x_high = min(xs), max(xs)
    return Axes(x_low, x_high if x_high > x_low else x_low + 1, low, high, log)


def _grid(axes: Axes, x_label: str, show: Callable[[float], str]) -> list[Markup]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    line = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    parts = []
    for value in log_ticks(axes.y_low, axes.y_high) if axes.log else ticks(axes.y_low, axes.y_high):
        y = axes.y(value)
        parts += [line.format(LEFT, right, y, y), text.format(LEFT - 6, y + 4, "end", show(value))]
    for value in filter(float.is_integer, ticks(axes.x_low, axes.x_high, 6)):  # x counts steps, or tokens
        x = axes.x(value)
        anchor = "end" if x > right - 12 else "middle"
        parts += [line.format(x, x, floor, floor + 4), text.format(x, floor + 15, anchor, compact(value))]
    parts.append(line.format(LEFT, right, floor, floor))
    parts.append(text.format((LEFT + right) / 2, HEIGHT - 4, "middle", x_label))
    return parts


def _curve(axes: Axes, series: Series) -> list[Markup]:
    colour = f"c{series.colour % COLOURS}"
    parts = []
    if series.band:
        edge = [(x, high) for x, _, high in series.band] + [(x, low) for x, low, _ in reversed(series.band)]
        parts.append(Markup('<path class="band {}" d="{}Z"/>').format(colour, _path(axes, edge)))
    faint = " faint" if series.faint else ""
    parts.append(Markup('<path class="line {}{}" d="{}"/>').format(colour, faint, _path(axes, series.points)))
    finite = [(x, y) for x, y in series.points if math.isfinite(y)]
    if len(finite) <= 12:  # a line alone would not tell where its points are, and of one there is no line
        dot = Markup('<circle class="dot {}{}" cx="{}" cy="{}" r="3"/>')
        parts += [dot.format(colour, faint, axes.x(x), axes.y(y)) for x, y in finite]
    return parts


def _path(axes: Axes, points: Sequence[Point]) -> str:
    path, pen = "", "M"
    for x, y in points:
        if math.isfinite(y):
            path, pen = f"{path}{pen}{axes.x(x):g} {axes.y(y):g}", "L"
        else:
            pen = "M"
    return path


def _mark(axes: Axes, mark: Mark) -> Markup:
    line = Markup('<line class="mark {}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}</title></line>')
    return line.format(mark.level, axes.x(mark.x), axes.x(mark.x), TOP, HEIGHT - BOTTOM, mark.text)


def _notes(axes: Axes, series: Sequence[Series], x_label: str, show: Callable[[float], str]) -> list[Markup]:
    """A strip for each place, and in it the note that is shown while the pointer is on the strip."""
    finite = [[point for point in s.points if math.isfinite(point[1])] for s in series]
    xs = sorted({x for points in finite for x, _ in points})
    places = xs if len(xs) <= NOTES else [xs[i * (len(xs) - 1) // (NOTES - 1)] for i in range(NOTES)]
    notes = []
    for i, x in enumerate(places):
        left = axes.x(x if i == 0 else (places[i - 1] + x) / 2) if len(places) > 1 else LEFT
        right = axes.x(x if i == len(places) - 1 else (x + places[i + 1]) / 2) if len(places) > 1 else WIDTH - RIGHT
        values = [(s, found) for s, points in zip(series, finite, strict=True) if (found := _at(points, x)) is not None]
        notes.append(_note(axes, x, (left, max(right, left + 2)), values, x_label, show))
    return notes


def _at(points: Sequence[Point], x: float) -> Point | None:
    """The point nearest to x, of a curve that reaches there."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    i = bisect_left(points, (x, -math.inf))
    return min(points[max(0, i - 1) : i + 1], key=lambda point: abs(point[0] - x))


def _shortened(name: str, most: int = 26) -> str:
    """A name that fits into a note; its end stays, by which runs of one recipe differ."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _note(
    axes: Axes,
    x: float,
    strip: tuple[float, float],
    values: Sequence[tuple[Series, Point]],
    x_label: str,
    show: Callable[[float], str],
) -> Markup:
    rows = [(f"{_shortened(s.name)} {show(y)}", s.colour) for s, (_, y) in values]
    title = f"{x_label.rpartition(' ')[2]} {compact(x)}"
    wide = 6.3 * max(len(text) for text in [title, *(text for text, _ in rows)]) + 20
    at = axes.x(x)
    left = at + 8 if at + 8 + wide < WIDTH else at - 8 - wide
    dot = Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3.5"/>')
    row = Markup('<circle class="dot c{}" cx="{}" cy="{}" r="3"/><text x="{}" y="{}">{}</text>')
    parts = [dot.format(s.colour % COLOURS, axes.x(px), axes.y(py)) for s, (px, py) in values]
    parts.append(
        Markup('<rect class="tip" x="{:.1f}" y="{:g}" width="{:.0f}" height="{}" rx="4"/>').format(
            left, TOP, wide, 20 + 15 * len(rows)
        )
    )
    parts.append(Markup('<text x="{:.1f}" y="{:g}">{}</text>').format(left + 8, TOP + 15, title))
    for i, (text, colour) in enumerate(rows, 1):
        y = TOP + 15 + 15 * i
        parts.append(row.format(colour % COLOURS, f"{left + 11:.1f}", f"{y - 4:g}", f"{left + 18:.1f}", f"{y:g}", text))
    whole = Markup(
        '<g class="spot"><rect x="{:g}" y="{:g}" width="{:.1f}" height="{:g}"/>'
        '<g><line class="axis" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>{}</g></g>'
    )
    floor = HEIGHT - BOTTOM
    return whole.format(strip[0], TOP, strip[1] - strip[0], floor - TOP, at, at, TOP, floor, Markup("").join(parts))
