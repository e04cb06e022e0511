"""What runs there are, what one is, and how two differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.runs import folders
from whet.runs.receipts import read_receipts

LAST = "export"
"""The stage after which a run is finished."""
Values = dict[str, Any]
"""By dotted name."""


@dataclass(frozen=True)
class Summary:
    """A run at a glance. state: finished, refused (by its gate), stopped, at work, or damaged: `fault` tells more.

    steps: optimizer steps. loss: of the last one, nats a token. size: bytes of its folder.
    """

    folder: Path
    name: str
    started: str
    state: str
    stages: tuple[str, ...]
    steps: int
    loss: float | None
    scores: Values
    size: int
    fault: str | None = None

    @property
    def id(self) -> str:
        return self.folder.name


def list_runs(root: Path) -> list[Summary]:
    """Every run under `root`, the latest begun last. Raises WhetError where `root` is no folder."""
    return sorted((summary(folder) for folder in folders.run_folders(root)), key=lambda run: (run.started, run.id))


def summary(folder: Path) -> Summary:
    size = size_of(folder)
    try:
        stages = stages_of(folder)
        facts, recipe, lines = folders.facts(folder), folders.recipe_values(folder), folders.metrics(folder)
    except WhetError as error:
        name = folder.name.rpartition("-")[0]
        return Summary(folder, name, "", "damaged", (), 0, None, {}, size, f"{error.where}: {error.what}")
    measured = measures(lines)
    return Summary(
        folder=folder,
        name=str(recipe.get("name", "")),
        started=str(facts.get("started", "")),
        state=state_of(folder, stages),
        stages=stages,
        steps=measured.get("train.steps", 0),
        loss=measured.get("train.last_loss"),
        scores={name: value for name, value in measured.items() if not name.startswith("train.")},
        size=size,
    )


def state_of(folder: Path, stages: Sequence[str]) -> str:
    """As in `Summary`, of a run that can be read."""
    if folders.at_work(folder):
        return "at work"
    if LAST in stages:
        return "finished"
    try:
        decision = json.loads((folder / "eval" / "gate.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "stopped"
    return "stopped" if decision.get("ship") is True else "refused"


def stages_of(folder: Path) -> tuple[str, ...]:
    """The stages that are done, in the order in which they were. Raises WhetError where the receipts are damaged."""
    done = [(receipt.event, stage) for stage, receipt in read_receipts(folder).items() if (folder / stage).is_dir()]
    return tuple(stage for _, stage in sorted(done))


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def measures(lines: Iterable[Mapping[str, Any]]) -> Values:
    """The numbers that a run ended with: steps and loss of the training, the last value of each evaluation."""
    steps = [line for line in lines if line.get("stage") == "train" and "step" in line]
    found: Values = {}
    if steps:
        found = {"train.steps": steps[-1]["step"]}
        losses = [line["loss"] for line in steps if isinstance(line.get("loss"), int | float)]
        found |= {"train.first_loss": losses[0], "train.last_loss": losses[-1]} if losses else {}
    for line in lines:
        if line.get("stage") == "eval":
            prefix = f"eval.{line['task']}" if "task" in line else "eval"
            kept = {key: value for key, value in line.items() if key not in ("time", "stage", "step", "task")}
            found |= {name: value for name, value in flat(kept, prefix).items() if isinstance(value, int | float)}
    return found


@dataclass(frozen=True)
class Difference:
    """Where two runs differ, by part (recipe, inputs, versions, hardware, code, metrics): name -> (left, right)."""

    parts: dict[str, dict[str, tuple[Any, Any]]]

    def __bool__(self) -> bool:
        return any(self.parts.values())


def diff(left: Path, right: Path) -> Difference:
    """How the run in folder `right` differs from the one in `left`; None stands for a name that one lacks."""
    one, other = _parts(left), _parts(right)
    return Difference({part: _unlike(one[part], other[part]) for part in one})


def _parts(folder: Path) -> dict[str, Values]:
    facts, lines = folders.facts(folder), folders.metrics(folder)
    versions = facts.get("lock") or facts.get("versions", {})
    python = facts.get("versions", {}).get("python")
    git = facts.get("git") or {}
    return {
        "recipe": flat(folders.recipe_values(folder)),
        "inputs": dict(facts.get("inputs", {})),
        "versions": {"python": python, **versions},
        "hardware": flat(facts.get("hardware", {})),
        "code": {"whet": facts.get("code"), **{f"git.{name}": value for name, value in git.items()}},
        "metrics": measures(lines),
    }


def _unlike(one: Values, other: Values) -> dict[str, tuple[Any, Any]]:
    names = [*one, *(name for name in other if name not in one)]
    pairs = {name: (one.get(name), other.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if not _same(a, b)}


def _same(one: Any, other: Any) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or ((type(one) is type(other) or _numbers(one, other)) and one == other)


def _numbers(one: Any, other: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))


def flat(value: Any, name: str = "") -> Values:
    """Nested maps and lists as one map: {"a": {"b": [1]}} -> {"a.b[0]": 1}. An empty one is a value."""
    if isinstance(value, Mapping) and (value or not name):
        pairs = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    else:
        return {name: value}
    return {key: leaf for place, item in pairs for key, leaf in flat(item, place).items()}
