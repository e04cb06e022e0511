"""What a run's folder holds, read so that a report can be made of any run: done, half done, stopped or damaged.

Nothing here raises for what is missing or damaged. It is listed, and the report says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml

from whet.errors import WhetError

HUGE = 1e30
STAGES = ("data", "trained", "eval", "export")
Json = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """A part of a run that a report can't show, and why."""

    part: str
    why: str


@dataclass(frozen=True)
class Answer:
    """What the model said to a prompt after so many steps; 0 is the base."""

    step: int
    prompt: str
    reference: str | None
    answer: str


@dataclass(frozen=True)
class Record:
    """A run's folder, read. Parts that are missing are empty, and named in `missing`.

    stages: name -> summary, of the stages that are done. metrics: the lines of metrics.jsonl, in their order.
    receipts: stage -> file -> its SHA-256. decision: the gate's; None where there was none.
    """

    folder: Path
    recipe: Json
    recipe_text: str
    facts: Json
    metrics: tuple[Json, ...]
    stages: Json
    data: Json
    receipts: Mapping[str, Json]
    samples: tuple[Answer, ...]
    decision: Json | None
    missing: tuple[Missing, ...]

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.id)

    def lines(self, stage: str) -> list[Json]:
        """The metrics of a stage."""
        return [line for line in self.metrics if line.get("stage") == stage]

    @property
    def steps(self) -> list[Json]:
        """The metrics of training, by step; of a step that was done twice, the last."""
        by_step = {line["step"]: line for line in self.lines("train") if is_count(line.get("step"))}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def waited_for(self) -> list[str]:
        """Stages that the recipe asks for and that are not done."""
        asked = [stage for stage in STAGES if stage != "eval" or self.recipe.get("eval", {}) is not None]
        return [stage for stage in asked if stage not in self.stages]


def read_run(folder: Path) -> Record:
    """Everything a report shows. Raises WhetError only where `folder` is no folder."""
    if not folder.is_dir():
        raise WhetError("no such run", where=str(folder), fix="whet runs list")
    missing: list[Missing] = []

    def read(part: str, path: Path, parse: Callable[[str], T], otherwise: T, absent: str | None) -> T:
        """The part in `path`. absent: why its absence matters; None where it does not."""
        try:
            return parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if absent is not None:
                missing.append(Missing(part, absent))
        except (OSError, ValueError, yaml.YAMLError) as error:  # never the error's text: it may quote the file's
            missing.append(Missing(part, f"{path.relative_to(folder)} can't be read: {_kind(error)}"))
        return otherwise

    empty: Json = {}
    text = read("recipe", folder / "recipe.yaml", str, "", "there is no recipe.yaml")
    recipe = read("recipe", folder / "recipe.yaml", _mapping(yaml.safe_load), empty, None)
    facts = read("versions and hardware", folder / "run.json", _mapping(json.loads), empty, "there is no run.json")
    lines = read("metrics", folder / "metrics.jsonl", str, "", "there is no metrics.jsonl: no step was done")
    metrics, damaged = _json_lines(lines)
    if damaged:
        where = ", ".join(map(str, damaged[:5])) + (" ..." if len(damaged) > 5 else "")
        missing.append(Missing("metrics", f"{len(damaged)} damaged lines of metrics.jsonl were left out: {where}"))
    stages = {}
    for stage in STAGES:
        if (folder / stage).is_dir():
            path = folder / stage / "summary.json"
            stages[stage] = read(
                f"stage {stage}", path, _mapping(json.loads), empty, f"{stage}/summary.json is missing"
            )
    data = read("data's version", folder / "data" / "manifest.json", _mapping(json.loads), empty, None)
    receipts = {
        path.stem: read("receipts", path, _mapping(json.loads), empty, None).get("files") or {}
        for path in sorted((folder / "receipts").glob("*.json"))
    }
    gate = read("gate's decision", folder / "eval" / "gate.json", _mapping(json.loads), None, None)
    samples: list[Answer] = []
    for path in sorted((folder / "samples").glob("*.jsonl")):
        found, damaged = _json_lines(read("samples", path, str, "", None))
        answers = [answer for line in found if (answer := _answer(line, path.stem))]
        samples += answers
        if unread := len(damaged) + len(found) - len(answers):
            missing.append(Missing("samples", f"{unread} lines of samples/{path.name} are not as whet writes them"))
    return Record(
        folder=folder,
        recipe=recipe,
        recipe_text=text,
        facts=facts,
        metrics=tuple(metrics),
        stages=stages,
        data=data,
        receipts=receipts,
        samples=tuple(samples),
        decision=gate,
        missing=tuple(dict.fromkeys(missing)),
    )


def part(of: Json, name: str) -> Json:
    """What `of` holds under that name; nothing where that is no mapping."""
    found = of.get(name)
    return found if isinstance(found, Mapping) else {}


def _mapping(parse: Callable[[str], Any]) -> Callable[[str], Json]:
    def checked(text: str) -> Json:
        value = parse(text)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value

    return checked


def _json_lines(text: str) -> tuple[list[Json], list[int]]:
    """The objects, and the numbers of the lines that hold none."""
    objects, damaged = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            objects.append(_mapping(json.loads)(line))
        except ValueError:
            damaged.append(number)
    return objects, damaged


def _answer(line: Json, stem: str) -> Answer | None:
    prompt, reference, answer = (line.get(name) for name in ("prompt", "reference", "answer"))
    step = line.get("step", int(stem) if stem.isdigit() else None)
    if not (isinstance(step, int) and isinstance(prompt, str) and isinstance(answer, str)):
        return None
    return Answer(step, prompt, reference if isinstance(reference, str) else None, answer)


def _kind(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON, line {error.lineno}"
    if isinstance(error, yaml.YAMLError):
        return "not YAML"
    return (error.strerror if isinstance(error, OSError) else None) or "not as whet writes it"


def number(value: Any) -> float | None:
    """A measured value; None for what is none. Out of all proportion (1e30 and more) counts as infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if abs(value) > HUGE:
        return math.copysign(math.inf, value)
    return 0.0 if abs(value) < 1 / HUGE else float(value)


def finite(value: Any) -> float | None:
    """A measured value that a sum can have in it."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < HUGE
