"""Training in a terminal: how far it is, the loss as a curve of characters, speed, memory, and the time left.

    training ━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━ 412/1000  ETA 0:07:38
    loss     █▇▅▄▃▂▁                                                               3.2700 first
    1.2705   █████████▇▇▆▆▅▅▄▅▄▄▄▃▃▃▃▂▃▃▃▂▂▂▂▂▂▂▂▁▂▂▂▁▂▁▁▁▁▁▁▁▁▁▁▂▂▂▁▂▁▁▁          0.9877 lowest
    21,005 tok/s    0.78 s a step    GPU 17.9 of 139.8 GiB    rate 1.2e-04    gradient norm 0.41

A step costs the training a few appends. Drawing is done by a thread, four times a second at most, from numbers that are
on the host already.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from whet.runs.memory import memory

REFRESHES = 4
"""Drawings a second."""

RECENT = 20
"""Steps that speed and the time left are told from."""

BLOCKS, PLAIN = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
"""Heights of an eighth of a line each, and what stands for them where the terminal knows only ASCII."""


class Curve:
    """Numbers in the order they came, thinned out by means: never more than `size` points, at a constant cost."""

    def __init__(self, size: int = 512):
        self.size, self.every = size, 1
        self.points: list[float] = []
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self.every:
            return
        self.points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.points) == self.size:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self.every *= 2


@dataclass
class Progress:
    """What is known of a training that runs. Times are in seconds of `time.monotonic`."""

    total: int
    step: int = 0
    loss: float | None = None
    first: float | None = None
    lowest: float = math.inf
    losses: Curve = field(default_factory=Curve)
    learning_rate: float | None = None
    grad_norm: float | None = None
    times: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT + 1))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(
        self,
        step: int,
        loss: float,
        now: float,
        *,
        learning_rate: float | None = None,
        grad_norm: float | None = None,
        seconds: float | None = None,
        tokens: float | None = None,
    ) -> None:
        """A step is done. seconds: that it took, without checkpoints between; tokens: that it learned from."""
        self.step, self.loss, self.learning_rate, self.grad_norm = step, loss, learning_rate, grad_norm
        self.first = loss if self.first is None else self.first
        self.lowest = min(self.lowest, loss)
        self.losses.add(loss)
        self.times.append(now)
        if seconds:
            self.seconds.append(seconds)
            self.tokens.append(tokens or 0.0)

    def speed(self) -> float | None:
        """Tokens a second over the recent steps."""
        return sum(self.tokens) / sum(self.seconds) if self.seconds and sum(self.tokens) else None

    def step_seconds(self) -> float | None:
        return sum(self.seconds) / len(self.seconds) if self.seconds else None

    def left(self, now: float) -> float | None:
        """Seconds to the end by the recent pace, checkpoints included."""
        if len(self.times) < 2:
            return None
        pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return max(0.0, pace * (self.total - self.step) - (now - self.times[-1]))


class LiveView:
    """The display, from `start` to `stop`. It leaves nothing behind on the terminal."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.progress = Progress(total=0)
        self._live = Live(self, console=console, refresh_per_second=REFRESHES, transient=True)

    def start(self, total: int, step: int = 0) -> None:
        self.progress = Progress(total=total, step=step)
        self._live.start()

    def step(self, step: int, loss: float, **measured: float | None) -> None:
        """A step is done; `measured` as in `Progress.add`."""
        self.progress.add(step, loss, self.clock(), **measured)

    def stop(self) -> None:
        """May be called again, and before `start`."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = PLAIN if options.ascii_only else BLOCKS
        yield from draw(self.progress, self.clock(), options.max_width, blocks, memory_text())


def draw(progress: Progress, now: float, width: int, blocks: str, held: str) -> Iterator[Padding | Text]:
    """The lines of the display. held: memory, in words."""
    head = Table.grid(padding=(0, 1), expand=True)
    head.add_column(width=8)
    head.add_column(ratio=1)
    head.add_column(justify="right")
    left = progress.left(now)
    eta = f"ETA {clock_text(left)}" if left is not None else ""
    bar = ProgressBar(total=max(progress.total, 1), completed=progress.step)
    head.add_row("training", bar, f"{progress.step}/{progress.total}  [bold]{eta}[/]")
    yield _indented(head)
    if progress.loss is None:
        yield Text("  the first step is on its way", style="dim")
    else:
        yield _indented(_loss(progress, width, blocks))
    yield _fitting(_facts(progress, held), width)


def _loss(progress: Progress, width: int, blocks: str) -> Table:
    """Two lines: the curve, what it is a curve of at its left, and where it has been at its right."""
    marks = f"{progress.first:.4f} first", f"{progress.lowest:.4f} lowest"
    upper, lower = sparkline(progress.losses.points, max(8, width - 32), 2, blocks)
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(width=8)
    rows.add_column(ratio=1, style="cyan", no_wrap=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_row("loss", upper, marks[0])
    rows.add_row(Text(f"{progress.loss:.4f}", style="bold"), lower, marks[1])
    return rows


def _facts(progress: Progress, held: str) -> list[str]:
    speed, seconds = progress.speed(), progress.step_seconds()
    facts = [
        f"{speed:,.0f} tok/s" if speed else "",
        f"{seconds:.2f} s a step" if seconds else "",
        held,
        f"rate {progress.learning_rate:.1e}" if progress.learning_rate is not None else "",
        f"gradient norm {progress.grad_norm:.3g}" if progress.grad_norm is not None else "",
    ]
    return [fact for fact in facts if fact]


def _fitting(facts: Sequence[str], width: int) -> Text:
    """As many of the facts as a line holds, the first ones first."""
    line = " "
    for fact in facts:
        if len(line) + len(fact) + 3 > width:
            break
        line += (" " if line == " " else "    ") + fact
    return Text(line, no_wrap=True)


def _indented(rows: Table) -> Padding:
    return Padding(rows, (0, 0, 0, 2))


def sparkline(values: Sequence[float], width: int, height: int, blocks: str = BLOCKS) -> list[str]:
    """`height` lines of at most `width` characters, the upper first; the lowest value is one eighth of a line high."""
    values = _shrunk(values, width)
    if not values:
        return [""] * height
    low, high = min(values), max(values)
    steps = height * (len(blocks) - 1)
    tall = [1 + round((value - low) / (high - low) * (steps - 1)) if high > low else 1 for value in values]
    full = len(blocks) - 1
    return ["".join(blocks[max(0, min(full, t - row * full))] for t in tall) for row in reversed(range(height))]


def _shrunk(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: means of stretches of equal length, give or take one value."""
    if len(values) <= width:
        return list(values)
    edges = [i * len(values) // width for i in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def memory_text() -> str:
    held, gib = memory(), 2**30
    if held.total is None:
        return f"RSS {held.used / gib:.1f} GiB"
    return f"GPU {held.used / gib:.1f} of {held.total / gib:.1f} GiB"


def clock_text(seconds: float) -> str:
    """Hours, minutes and seconds: 0:12:31."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
