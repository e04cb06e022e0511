"""The answers that a study compares, read from files and paired by id.

Three kinds of file, told apart by what their lines hold:

    results   a TaskResult as `evals.results` saves it
    answers   {"id": ..., "prompt": ..., "answer": ...} a line, "reference" if there is one
    run       eval/answers.jsonl of a run, {"prompt": ..., "base": ..., "tuned": ...}: two systems in one file
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.evals import results

LINE = '{"id": "1", "prompt": "...", "answer": "..."}'
LISTED = 3
"""Ids that a message names."""


@dataclass(frozen=True)
class Answer:
    prompt: str
    reference: str | None
    text: str


@dataclass(frozen=True)
class System:
    """What one model answered. where: the file; task: digest of the task that a TaskResult names."""

    name: str
    where: str
    answers: Mapping[str, Answer]
    task: str | None = None


@dataclass(frozen=True)
class Item:
    """One question and each system's answer to it, in the systems' order."""

    id: str
    prompt: str
    reference: str | None
    answers: tuple[str, ...]


def read_systems(path: Path, name: str | None = None) -> list[System]:
    """The systems in a file: one, or the base and the tuned model of a run. name: replaces the one in the file."""
    rows = list(_rows(path))
    if not rows:
        raise WhetError("the file holds no answers", where=str(path), fix=f"give lines like {LINE}")
    if {"prompt", "base", "tuned"} <= rows[0][1].keys():
        if name is not None:
            raise WhetError("a run's answers are of two systems", where=str(path), fix="give the file without a name")
        return [_of_run(path, rows, side) for side in ("base", "tuned")]
    if _is_result(rows[0][1]):
        return [_of_result(path, name)]
    return [System(name or path.stem, str(path), _paired_by_id(path, rows))]


def read_named(text: str) -> list[System]:
    """The systems of a file given as FILE or NAME=FILE; a file that has a = in its own name is taken as it is."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return read_systems(Path(text))
    if not name.strip():
        raise WhetError("the name is empty", where=text, fix="give FILE or NAME=FILE")
    return read_systems(Path(path), name.strip())


def pair(systems: Sequence[System], *, shared: bool = False) -> list[Item]:
    """Items that every system answered, in the first one's order.

    shared: leave out items that a system lacks, which is an error otherwise. Raises WhetError too for other prompts
    under the same id, for results of different tasks, and for fewer than two systems or two of one name.
    """
    _check_names(systems)
    _check_tasks(systems)
    first = systems[0]
    ids = [id for id in first.answers if all(id in system.answers for system in systems)]
    if not shared:
        _check_complete(systems, set(ids))
    if not ids:
        where = ", ".join(system.where for system in systems)
        raise WhetError("no id is in all files", where=where, fix="compare answers to the same questions")
    items = []
    for id in ids:
        question = first.answers[id]
        for system in systems[1:]:
            if system.answers[id].prompt != question.prompt:
                what = f"item {id!r} has another prompt than in {first.where}"
                raise WhetError(what, where=system.where, fix="compare answers to the same questions")
        texts = tuple(system.answers[id].text for system in systems)
        items.append(Item(id, question.prompt, question.reference, texts))
    return items


def plain(text: str) -> str:
    """White space at the ends cut, and half a surrogate pair, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


# ---------------------------------------------------------------- files


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise WhetError(f"cannot read the file: {error}", where=str(path), fix="check the path") from error


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WhetError(f"not JSON: {error}", where=f"{path}:{number}", fix=f"give lines like {LINE}") from error
    if not isinstance(value, dict):
        raise WhetError("not a JSON object", where=f"{path}:{number}", fix=f"give lines like {LINE}")
    return value


def _is_result(row: Mapping[str, Any]) -> bool:
    """Whether a first line is that of a TaskResult, which tells the task before any item."""
    return {"task", "model"} <= row.keys()


def _of_result(path: Path, name: str | None) -> System:
    result = results.TaskResult.load(path)
    answers = {item.id: _answer(item) for item in result.items}
    return System(name or result.model, str(path), answers, result.digest)


def _answer(item: results.Item) -> Answer:
    reference = None if item.reference is None else plain(item.reference)
    return Answer(plain(item.prompt), reference, plain(item.answer))


def _of_run(path: Path, rows: Sequence[tuple[int, dict[str, Any]]], side: str) -> System:
    answers = {}
    for number, row in rows:
        where = f"{path}:{number}"
        answers[str(number)] = Answer(_text(row, "prompt", where), _reference(row, where), _text(row, side, where))
    return System(side, str(path), answers)


def _paired_by_id(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for number, row in rows:
        where = f"{path}:{number}"
        id = row.get("id")
        if isinstance(id, bool) or not isinstance(id, str | int) or id == "":
            raise WhetError("no id: a text or a whole number", where=where, fix=f"give lines like {LINE}")
        if str(id) in answers:
            raise WhetError(f"the id {id!r} is there twice", where=where, fix="give each item an id of its own")
        answers[str(id)] = Answer(_text(row, "prompt", where), _reference(row, where), _text(row, "answer", where))
    return answers


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(value := row.get(field), str):
        raise WhetError(f'"{field}" is missing or not a text', where=where, fix=f"give lines like {LINE}")
    return plain(value)


def _reference(row: Mapping[str, Any], where: str) -> str | None:
    return None if row.get("reference") is None else _text(row, "reference", where)


# ---------------------------------------------------------------- checks


def _check_names(systems: Sequence[System]) -> None:
    if len(systems) < 2:
        where = systems[0].where if systems else None
        raise WhetError("there is one system, and nothing to compare it with", where=where, fix="give two files")
    names = [system.name for system in systems]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        fix = "name them: base=FILE tuned=FILE"
        raise WhetError(f"two systems are called {twice[0]!r}", where=systems[0].where, fix=fix)


def _check_tasks(systems: Sequence[System]) -> None:
    first, *others = [system for system in systems if system.task is not None] or systems[:1]
    for other in others:
        if other.task != first.task:
            what = f"the results are of another task, or of other data, than {first.where}"
            raise WhetError(what, where=other.where, fix="run both models on the same task")


def _check_complete(systems: Sequence[System], shared: set[str]) -> None:
    for system in systems:
        missing = [id for other in systems for id in other.answers if id not in system.answers]
        if missing := list(dict.fromkeys(missing)):
            listed = ", ".join(map(repr, missing[:LISTED])) + (" ..." if len(missing) > LISTED else "")
            what = f"{len(missing)} items of the other files are not here: {listed}"
            fix = f"answer all of them, or compare the {len(shared)} in all files with --shared"
            raise WhetError(what, where=system.where, fix=fix)
