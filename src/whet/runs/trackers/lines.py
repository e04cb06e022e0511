"""What trackers have in common: what they are told at the start, and how a line of metrics.jsonl reads to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

Line = Mapping[str, Any]
End = Literal["done", "stopped", "failed"]
OUTSIDE = {"time", "stage", "step", "task", "model"}
"""Keys of a line that say when and of what it is, not how much."""

RENAMED = {"tokens": "tokens_per_step", "memory": "memory_bytes"}


@dataclass(frozen=True)
class Tracking:
    """Who follows a run. mlflow: "sqlite" for a file beside the runs, or the address of a server or a database."""

    mlflow: str | None = None
    wandb: Literal["offline", "online"] | None = None
    tensorboard: bool = False
    project: str = "whet"


@dataclass(frozen=True)
class Start:
    """What is known when a run starts, or goes on.

    params: the recipe, flat. tags: digests of its inputs, versions, commit. step: the last one that was done.
    """

    run: str
    folder: Path
    params: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    step: int = 0

    @property
    def root(self) -> Path:
        """The folder of the runs."""
        return self.folder.parent


@dataclass(frozen=True)
class Point:
    """Numbers of one moment. time: seconds since 1970; step: the optimizer's, the last one for what has none."""

    step: int
    time: float
    values: Mapping[str, float]


class Tracker(Protocol):
    """Opened in the caller's thread, then used by one other thread."""

    name: str

    def write(self, points: Sequence[Point]) -> None: ...

    def close(self, end: End, digests: Mapping[str, str]) -> None:
        """digests: SHA-256 of the run's files, by name."""


def points_of(lines: Sequence[Line], last_step: int) -> list[Point]:
    """The numbers of lines of metrics.jsonl, under the names they have at trackers. Texts are never sent.

    last_step: the one before them; a line without a step belongs to the last one before it.
    """
    points = []
    for line in lines:
        stage, step, time = str(line.get("stage", "train")), line.get("step"), line.get("time")
        step = step if isinstance(step, int) else last_step
        last_step = max(last_step, step)
        if values := dict(_evaluated(line) if stage == "eval" else _numbers(stage, line)):
            points.append(Point(step, float(time) if _is_number(time) else 0.0, values))
    return points


def _numbers(stage: str, line: Line) -> list[tuple[str, float]]:
    return [
        (f"{stage}/{RENAMED.get(key, key)}", float(value))
        for key, value in line.items()
        if key not in OUTSIDE and _is_number(value)
    ]


def _evaluated(line: Line) -> list[tuple[str, float]]:
    """eval/TASK/MODEL, and the ends of its interval."""
    if (task := line.get("task")) is not None:
        name = f"eval/{task}/{line.get('model') or 'tuned'}"
        named = {"mean": name, "low": f"{name}/low", "high": f"{name}/high", "seconds": f"{name}/seconds"}
        return [(named[key], float(line[key])) for key in named if _is_number(line.get(key))]
    return [
        (f"eval/{measure}/{model}", float(value))
        for model, measures in line.items()
        if isinstance(measures, Mapping)
        for measure, value in measures.items()
        if _is_number(value)
    ]


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a float can hold it, without a bool, which Python counts among the integers."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
