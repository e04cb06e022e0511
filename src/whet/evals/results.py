"""What an evaluation found: an item for each question, kept as JSON lines.

{"task": ..., "digest": ..., "model": ..., "scorer": ..., "seconds": ..., "measures": {...}, "items": N, "version": 1}
{"id": ..., "prompt": ..., "reference": ..., "answer": ..., "score": 0.5, "note": ...}     N times
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.files import write_text

VERSION = 1
AGAIN = "run the evaluation again"
HEAD = {"task": str, "digest": str, "model": str, "scorer": str, "seconds": (int, float), "measures": dict}
ITEM = {"id": str, "prompt": str, "reference": (str, type(None)), "answer": str, "note": (str, type(None))}


@dataclass(frozen=True)
class Item:
    """A question, the answer it got, and what the answer is worth.

    prompt: as a person reads it. score: 0 to 1; None where the answer could not be scored, which counts as 0 and is
    reported. note: why, or what else the scorer has to say.
    """

    id: str
    prompt: str
    reference: str | None
    answer: str
    score: float | None
    note: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to a task.

    digest: of the task and its data, so that only like is compared with like. seconds: what it took.
    measures: what a library computes over all answers at once, such as BLEU; not the mean of the items' scores.
    """

    task: str
    digest: str
    model: str
    items: tuple[Item, ...]
    seconds: float
    scorer: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> list[float]:
        """Of each item, in order; 0 for one that could not be scored."""
        return [item.score or 0.0 for item in self.items]

    @property
    def mean(self) -> float:
        """Of the items' scores."""
        return math.fsum(self.scores) / len(self.items)

    @property
    def unscored(self) -> int:
        """Items whose answer could not be scored."""
        return sum(item.score is None for item in self.items)

    def save(self, path: Path) -> None:
        """Write the file whole."""
        head = {name: getattr(self, name) for name in HEAD} | {"items": len(self.items), "version": VERSION}
        lines = [head | {"measures": dict(self.measures)}, *map(asdict, self.items)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))

    @classmethod
    def load(cls, path: Path) -> TaskResult:
        """Raises WhetError when the file is not there, is damaged, or lacks items."""
        lines = _read_lines(path)
        head = _checked(lines[0], HEAD, f"{path}:1")
        if head.get("version") != VERSION:
            raise _damaged(f"{path}:1", f"these are results of version {head.get('version')!r}, not {VERSION}")
        items = tuple(_item(line, f"{path}:{number}") for number, line in enumerate(lines[1:], start=2))
        if head.get("items") != len(items):
            raise _damaged(str(path), f"{head.get('items')} items were written and {len(items)} are there")
        if len({item.id for item in items}) < len(items):
            raise _damaged(str(path), "two items have one id")
        if not items:
            raise _damaged(str(path), "there are no items")
        for name, value in head["measures"].items():
            _finite(value, name, f"{path}:1")
        return cls(**{name: head[name] for name in HEAD}, items=items)


def _read_lines(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise WhetError("there are no results here", where=str(path), fix=AGAIN) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WhetError(f"the results can't be read: {error}", where=str(path), fix=AGAIN) from error
    if not text.strip():
        raise _damaged(str(path), "the file is empty")
    if not text.endswith("\n"):
        raise _damaged(str(path), "the last line is torn")
    lines = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            lines.append(json.loads(line, parse_constant=_no_number))
        except (ValueError, RecursionError) as error:
            raise _damaged(f"{path}:{number}", f"not JSON: {error}") from None
    return lines


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _item(line: Any, where: str) -> Item:
    values = _checked(line, ITEM, where)
    score = values.get("score")
    if score is not None and not 0 <= _finite(score, "score", where) <= 1:
        raise _damaged(where, f"the score is {score!r}, not between 0 and 1")
    return Item(score=score, **{name: values[name] for name in ITEM})


def _checked(line: Any, fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The line as a mapping that has these fields, of these types."""
    if not isinstance(line, dict):
        raise _damaged(where, "not a JSON object")
    for name, kinds in fields.items():
        if name not in line:
            raise _damaged(where, f"{name} is missing")
        if not isinstance(line[name], kinds) or isinstance(line[name], bool):
            raise _damaged(where, f"{name} is {line[name]!r}")
    return line


def _finite(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _damaged(where, f"{name} is {value!r}, not a number")
    return value


def _damaged(where: str, what: str) -> WhetError:
    return WhetError(f"results that are damaged: {what}", where=where, fix=AGAIN)
