"""The texts of evaluation tasks that no training row may hold: questions and answers, whatever the file.

    .jsonl .json .csv .tsv .parquet    rows with the columns below
    .yaml .yml                         mappings with these keys, at any depth; the rows that a task's `data` names

A task of lm-evaluation-harness (`benchmark`) holds no text, and nothing is compared with it.

Messages are questions, but for those of the assistant, which are answers, and of the system, which are neither: many
rows share them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from whet.data.read.paths import kind_of, matching_files
from whet.data.read.rows import READERS, read_rows
from whet.data.similar.leaks import Role
from whet.errors import WhetError

QUESTIONS = (
    "question", "prompt", "input", "instruction", "query", "problem", "text", "context", "passage", "document",
    "messages", "conversations",
)  # fmt: skip
ANSWERS = (
    "answer", "answers", "output", "completion", "response", "target", "expected", "ideal", "reference", "solution",
    "chosen", "rejected",
)  # fmt: skip
YAML = (".yaml", ".yml")

_ROLES: dict[str, Role] = {"assistant": "answer", "gpt": "answer", "user": "question", "human": "question"}
_DEEPEST = 4  # task, messages, message, its parts


@dataclass(frozen=True)
class TaskText:
    """where: the file and line of the task."""

    text: str
    where: str
    role: Role


def read_tasks(paths: Iterable[str], base: Path) -> list[TaskText]:
    """The texts of every task in the files that match. Paths and globs are relative to `base`.

    Raises WhetError when a path matches no file, a file cannot be read, or has no column of a task.
    """
    found: list[TaskText] = []
    for pattern in paths:
        for path, source in task_files(pattern, base):
            before = len(found)
            columns: dict[str, None] = {}
            for values, where in _records(path, source, base):
                columns |= dict.fromkeys(map(str, values))
                found += (TaskText(text, where, role) for text, role in _texts_of(values))
            if len(found) == before and "benchmark" not in columns:
                raise WhetError(
                    f"no task in the file; its columns are {', '.join(columns) or 'none'}",
                    where=source,
                    fix=f"name the column of the question one of {', '.join(QUESTIONS)}",
                )
    return found


def task_files(pattern: str, base: Path) -> list[tuple[Path, str]]:
    """(path, name to show) of the files of tasks that match. Raises WhetError where none does."""
    return list(matching_files(pattern, base, [*READERS, *YAML], skip_others=True))


def _records(path: Path, source: str, base: Path) -> Iterator[tuple[Mapping[Any, Any], str]]:
    if kind_of(source) in YAML:
        for values, where in _yaml_records(path, source):
            yield values, where
            yield from _rows_of(values, path.parent)
    else:
        for row in read_rows(str(path.relative_to(base) if path.is_relative_to(base) else path), base=base):
            yield row.values, row.where


def _rows_of(task: Mapping[Any, Any], folder: Path) -> Iterator[tuple[Mapping[Any, Any], str]]:
    """The rows of a task's `data`, their columns called as the task calls them (evals/tasks.py)."""
    data, columns, template = (task.get(name) for name in ("data", "columns", "template"))
    if not isinstance(data, str) or "scorer" not in task:
        return
    named = [field for _, field, _, _ in Formatter().parse(template) if field] if isinstance(template, str) else []
    for row in read_rows(data, base=folder):
        renamed = {part: row.values.get(name) for part, name in (columns or {}).items()}
        yield {**row.values, **renamed, "problem": [row.values.get(name) for name in named]}, row.where


def _texts_of(values: Mapping[Any, Any]) -> Iterator[tuple[str, Role]]:
    for name, value in values.items():
        key = str(name).lower()
        if key in QUESTIONS:
            yield from _texts_in(value, "question")
        elif key in ANSWERS:
            yield from _texts_in(value, "answer")


def _texts_in(value: Any, role: Role) -> Iterator[tuple[str, Role]]:
    """The texts of a column: a text, messages, a list of texts, or the JSON of one of these, as CSV holds it."""
    if isinstance(value, str):
        parsed = _list_in(value)
        if parsed is None:
            if value.strip():
                yield value, role
        else:
            yield from _texts_in(parsed, role)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item, role)
    elif isinstance(value, Mapping):
        speaker = str(value.get("role", value.get("from", "")))
        if speaker != "system":
            said = value.get("content", value.get("value", value.get("text")))
            yield from _texts_in(said, _ROLES.get(speaker, role))


def _list_in(text: str) -> list[Any] | None:
    if not text.startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else None


# ---------------------------------------------------------------- YAML


def _yaml_records(path: Path, source: str) -> Iterator[tuple[Mapping[Any, Any], str]]:
    """Every mapping, with the line it starts at."""
    try:
        documents = list(yaml.compose_all(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = source if mark is None else f"{source}:{mark.line + 1}"
        raise WhetError("not readable as YAML", where=where, fix="mend the file, or convert it to JSONL") from error
    seen: set[int] = set()  # aliases may point anywhere, upwards too
    waiting: list[yaml.Node] = [document for document in documents if document is not None]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
        elif isinstance(node, yaml.MappingNode):
            yield _plain(node, _DEEPEST), f"{source}:{node.start_mark.line + 1}"
            waiting += reversed([value for key, value in node.value if key.value != "columns"])  # names, no texts


def _plain(node: yaml.Node, depth: int) -> Any:
    """The node's value, numbers and dates as their text. What lies deeper than messages do is left out."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if not depth:
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, depth - 1) for item in node.value]
    return {key.value: _plain(value, depth - 1) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
