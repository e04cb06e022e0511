"""From rows of a data file, or of a task's own list, to questions.

A row holds `prompt` (text, or messages) or `messages`, and, where the scorer asks for them, `reference`, `choices` and
its own columns. Rows of training formats will do as they are: their last answer is the reference.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from whet.data.examples import Conversation, Message
from whet.data.faults import Faults
from whet.data.formats import detect, normalise
from whet.data.messages import SHAREGPT_ROLES, kind, list_of, messages_of, text_of
from whet.data.read.rows import Row
from whet.errors import WhetError
from whet.evals.models import Prompt
from whet.evals.scorers.base import Question

PARTS = ("id", "prompt", "messages", "tools", "system", "reference", "choices")
"""What a row may say of a question, besides what its scorer reads."""
ID_DIGITS = 12


@dataclass(frozen=True)
class Reading:
    """How rows become questions.

    columns: part -> the column's name, where they differ. template: of the prompt, with {COLUMN} for a row's values.
    chat: whether a prompt is a user's message or a text to go on from. system, choices: for rows without their own.
    strict: besides PARTS, rows have no columns but these; None lets them have any.
    """

    columns: Mapping[str, str]
    template: str | None = None
    chat: bool = True
    system: str | None = None
    choices: tuple[str, ...] = ()
    needs_reference: bool = False
    strict: tuple[str, ...] | None = None


def questions_of(rows: Iterable[Row], reading: Reading, faults: Faults) -> list[Question]:
    """A question a row, in order. What is wrong with a row goes to `faults`."""
    found = []
    for row in rows:
        try:
            found.append(_question(row, reading))
        except WhetError as error:
            faults.add(WhetError(error.what, where=error.where or row.where, fix=error.fix))
    return found


def with_ids(questions: Sequence[Question]) -> tuple[Question, ...]:
    """Questions without an id get one made of their content, so that the order of rows does not matter to it.

    Raises WhetError where two rows have one id.
    """
    given = Counter(question.id for question in questions if question.id)
    twice = next((question for question in questions if given[question.id] > 1), None)
    if twice is not None:
        raise WhetError(f"several rows have the id {twice.id!r}", where=twice.where, fix="give each its own")
    seen: Counter[str] = Counter()
    found = []
    for question in questions:
        own = question.id
        if not own:
            digest = content_digest(question)[:ID_DIGITS]
            seen[digest] += 1
            own = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        found.append(replace(question, id=own))
    return tuple(found)


def content(question: Question) -> dict[str, Any]:
    """What the question says, as plain JSON values."""
    return {
        "messages": question.prompt.messages,
        "text": question.prompt.text,
        "tools": question.prompt.tools,
        "references": question.references,
        "choices": question.choices,
        "extra": question.extra,
    }


def content_digest(question: Question) -> str:
    """SHA-256, in hex, of the content."""
    return hashlib.sha256(json.dumps(content(question), sort_keys=True, default=str).encode()).hexdigest()


def _question(row: Row, reading: Reading) -> Question:
    values = _renamed(row, reading.columns)
    if reading.strict is not None:
        _check_known(values, (*PARTS, *reading.strict), row.where)
    values = {name: value for name, value in values.items() if value is not None}
    messages, last = _asked(values, row, reading)
    references = _references(values.get("reference", last), row.where)
    if reading.needs_reference and not references:
        fix = "add a column reference, or name it, as: columns: {reference: NAME}"
        raise WhetError("there is no reference to score by", where=row.where, fix=fix)
    choices = tuple(_texts(values["choices"], "choices", row.where)) if "choices" in values else reading.choices
    extra = {str(name): value for name, value in values.items() if name not in PARTS}
    own = str(values["id"]) if "id" in values else ""
    return Question(own, _prompt(messages, values, row, reading), references, choices, extra, row.where)


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under the names of the parts they play."""
    missing = [name for name in columns.values() if name not in row.values]
    if missing:
        have = ", ".join(map(str, row.values)) or "none"
        raise WhetError(f"no column {missing[0]!r}; the row has {have}", where=row.where, fix="mend columns")
    taken = set(columns.values())
    kept = {name: value for name, value in row.values.items() if name not in taken and name not in columns}
    return kept | {part: row.values[name] for part, name in columns.items()}


def _check_known(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [name for name in values if name not in known]
    if unknown:
        raise WhetError(f"unknown key {unknown[0]!r}", where=where, fix=f"use {', '.join(known)}")


def _asked(values: dict[str, Any], row: Row, reading: Reading) -> tuple[list[Message], str | None]:
    """The messages that wait for an answer; and the answer that the row itself holds after them."""
    if reading.template is not None:
        return [_user(_filled(reading.template, values, row))], None
    if isinstance(values.get("prompt"), str):
        return [_user(text_of(values["prompt"], "prompt", row.where))], _completion(values)
    name = next((name for name in ("prompt", "messages", "conversations") if name in values), None)
    if name is not None:
        messages = messages_of(values[name], name, row.where, roles=SHAREGPT_ROLES)
    else:
        example = normalise(row, detect(values, where=row.where))
        if not isinstance(example, Conversation):
            fix = "name the columns of prompt and reference, as: columns: {prompt: question, reference: answer}"
            raise WhetError("the row asks nothing", where=row.where, fix=fix)
        messages = list(example.messages)
    if messages[-1]["role"] != "assistant":
        return messages, None
    if "reference" in values:
        fix = "remove the last message, or the reference"
        raise WhetError(f"{name} ends in an answer, and there is a reference too", where=row.where, fix=fix)
    if len(messages) == 1:
        raise WhetError("there is an answer and nothing before it", where=row.where, fix="add the question")
    return messages[:-1], str(messages[-1]["content"])


def _completion(values: Mapping[str, Any]) -> str | None:
    """Of a row in the format prompt-completion."""
    found = values.get("completion")
    return found if isinstance(found, str) else None


def _prompt(messages: list[Message], values: Mapping[str, Any], row: Row, reading: Reading) -> Prompt:
    if not reading.chat:
        if len(messages) > 1:
            what = "messages are for a chat template, and the task has none (chat: false)"
            raise WhetError(what, where=row.where, fix="write the prompt as text, or leave chat out")
        return Prompt(text=str(messages[0]["content"]))
    system = values.get("system", reading.system)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": text_of(system, "system", row.where)}, *messages]
    tools = list_of(values["tools"], "tools", row.where) if values.get("tools") else None
    return Prompt(messages=messages, tools=tools)


def _references(value: Any, where: str) -> tuple[str, ...]:
    """One reference or several, numbers as their text. An empty text is an answer like any other."""
    if value is None:
        return ()
    return tuple(_texts(value if isinstance(value, list) else [value], "reference", where))


def _texts(values: Any, name: str, where: str) -> list[str]:
    found = []
    for value in list_of(values, name, where):
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            fix = 'write it in quotes, as "yes"' if isinstance(value, bool) else "write it as text"
            raise WhetError(f"{name} is {kind(value)} where text is wanted", where=where, fix=fix)
        found.append(str(value))
    return found


def _filled(template: str, values: Mapping[str, Any], row: Row) -> str:
    """The template with the row's values in it, texts and numbers alone."""
    text = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            if not isinstance(values.get(name), str | int | float):
                have = ", ".join(map(str, values))
                raise WhetError(
                    f"no text in a column {name!r}; the row has {have}", where=row.where, fix="mend template"
                )
            text += str(values[name])
    return text_of(text, "prompt", row.where)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
