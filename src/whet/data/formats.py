"""Formats of training records, told apart by their columns, and turned into examples.

    messages           messages (or conversations): [{"role", "content"}, ...]; tools, as JSON schemas, if there are any
    sharegpt           conversations (or messages): [{"from", "value"}, ...]; system
    prompt-completion  prompt, completion; system
    alpaca             instruction, output; input, system
    text               text
    preference         prompt, chosen, rejected, as text or as messages; or chosen and rejected as whole conversations
                       that share their beginning

`columns` says which of the row's columns plays each of these parts, as {"instruction": "question"}.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from whet.data.examples import Conversation, Example, Message, Preference, Text
from whet.data.faults import Faults
from whet.data.messages import SHAREGPT_ROLES, check_answered, list_of, messages_of, text_of
from whet.data.read.rows import Origin, Row, read_rows
from whet.errors import WhetError, WhetErrors


@dataclass(frozen=True)
class Source:
    """Where records lie and how to read them: a path, glob or folder, or what else `read.Origin` can say.

    format: None: told from the first row.
    """

    origin: str | Origin
    format: str | None = None
    columns: Mapping[str, str] | None = None


def load_examples(sources: Sequence[Source], *, base: Path) -> list[Example]:
    """Reads and normalises every source, in the order given.

    Raises WhetErrors holding up to twenty faults from all sources.
    """
    faults = Faults()
    examples: list[Example] = []
    for source in sources:
        try:
            rows = read_rows(source.origin, base=base, on_error=faults.add)
            examples += normalise_all(rows, source.format, source.columns, faults=faults)
        except WhetErrors:  # twenty are enough
            raise
        except WhetError as error:
            faults.add(error)
    faults.raise_if_any()
    return examples


def format_of(source: Source, base: Path) -> str | None:
    """The format that is declared, or that the first row has; None where there is no row to tell it from."""
    if source.format is not None:
        _check_declared(source.format, source.columns)
        return source.format
    for row in read_rows(source.origin, base=base, on_error=_passed_over):
        format = detect(_rename(row.values, source.columns), where=row.where)
        _check_declared(format, source.columns)
        return format
    return None


def _passed_over(error: WhetError) -> None:
    """What is wrong with a row is told when all rows are read."""


def normalise_all(
    rows: Iterable[Row], format: str | None, columns: Mapping[str, str] | None, *, faults: Faults
) -> list[Example]:
    """The examples of one source. The first row decides an undeclared format.

    Faults of single rows go to `faults`; a fault of the source (no such format) is raised.
    """
    examples: list[Example] = []
    for row in rows:
        if format is None:
            format = detect(_rename(row.values, columns), where=row.where)
        _check_declared(format, columns)
        try:
            examples.append(normalise(row, format, columns))
        except WhetError as error:
            faults.add(error)
    return examples


def detect(row_values: Mapping[str, Any], *, where: str | None = None) -> str:
    """The name of the format whose columns the row has. Raises WhetError when none fits."""
    if {"chosen", "rejected"} <= row_values.keys():
        return "preference"
    for name in ("messages", "conversations"):
        if name in row_values:
            first = list_of(row_values[name], name, where or "the first row")[0]
            return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    for format in ("alpaca", "prompt-completion", "text"):
        if set(FORMATS[format].required) <= row_values.keys():
            return format
    raise WhetError(
        f"cannot tell the format of a row with the columns {', '.join(map(str, row_values)) or '(none)'}",
        where=where,
        fix="say which column plays which part, as: format: prompt-completion, "
        "columns: {prompt: question, completion: answer}",
    )


def normalise(row: Row, format: str, columns: Mapping[str, str] | None = None) -> Example:
    """The example that a row of the named format holds.

    columns: the part a column plays -> the column's name, where they differ.
    Raises WhetError for a missing column, a wrong type, empty content, an unknown role, or no answer to learn from.
    """
    _check_declared(format, columns)
    spec = FORMATS[format]
    parts = _Parts(_rename(row.values, columns), spec, row, columns or {})
    for part in spec.required:
        if part not in parts.values:
            raise _missing(part, parts)
    return spec.build(parts)


def _check_declared(format: str, columns: Mapping[str, str] | None) -> None:
    if format not in FORMATS:
        raise WhetError(
            f"no format is called {format!r}",
            where="format",
            fix=f"use {_nearest(format, FORMATS) or ', '.join(FORMATS)}",
        )
    parts = FORMATS[format].parts
    for part in columns or {}:
        if part not in parts:
            raise WhetError(
                f"the format {format} has no part {part!r}",
                where=f"columns.{part}",
                fix=f"use {_nearest(part, parts) or ', '.join(parts)}",
            )
    names = list((columns or {}).values())
    for name in names:
        if names.count(name) > 1:
            raise WhetError(f"two parts name the column {name!r}", where="columns", fix="give each part its own column")


def _rename(values: Mapping[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The row with its columns under the names of the parts they play. A mapped column that is absent stays so."""
    names = {column: part for part, column in (columns or {}).items()}
    kept = {name: value for name, value in values.items() if name in names or name not in names.values()}
    return {names.get(name, name): value for name, value in kept.items()}


def _missing(part: str, parts: _Parts) -> WhetError:
    wanted = parts.columns.get(part, part)
    columns = parts.row.values
    near = _nearest(wanted, [name for name in columns if name not in parts.spec.parts])
    return WhetError(
        f"no column {wanted!r}; the row has {', '.join(map(str, columns)) or 'none'}",
        where=parts.row.where,
        fix=f"map it, as: columns: {{{part}: {near or 'NAME'}}}",
    )


def _nearest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, [str(w) for w in words], n=1, cutoff=0.5)), None)


# ---------------------------------------------------------------- one builder a format


@dataclass(frozen=True)
class _Parts:
    """A row whose columns carry the names of the parts they play."""

    values: Mapping[str, Any]
    spec: _Format
    row: Row
    columns: Mapping[str, str]

    def text(self, part: str) -> str:
        return text_of(self.values[part], part, self.row.where)

    def optional_text(self, part: str) -> str | None:
        return None if self.values.get(part) in (None, "") else self.text(part)

    def origin(self) -> dict[str, Any]:
        extra = {name: value for name, value in self.values.items() if name not in self.spec.parts}
        return {"source": self.row.source, "line": self.row.line, "extra": extra}


def _messages(parts: _Parts) -> Example:
    return _conversation(parts, {})


def _sharegpt(parts: _Parts) -> Example:
    return _conversation(parts, SHAREGPT_ROLES)


def _conversation(parts: _Parts, roles: Mapping[str, str]) -> Example:
    name = "messages" if "messages" in parts.values else "conversations"
    if name not in parts.values:
        raise _missing(parts.spec.parts[0], parts)
    messages = messages_of(parts.values[name], name, parts.row.where, roles=roles)
    check_answered(messages, name, parts.row.where)
    tools = parts.values.get("tools") or None
    return Conversation(
        messages=_system(parts) + messages,
        tools=None if tools is None else list_of(tools, "tools", parts.row.where),
        **parts.origin(),
    )


def _prompt_completion(parts: _Parts) -> Example:
    turns = [_user(parts.text("prompt")), _assistant(parts.text("completion"))]
    return Conversation(messages=_system(parts) + turns, **parts.origin())


def _alpaca(parts: _Parts) -> Example:
    """The input follows the instruction after an empty line."""
    given = parts.optional_text("input")
    question = parts.text("instruction") if given is None else f"{parts.text('instruction')}\n\n{given}"
    turns = [_user(question), _assistant(parts.text("output"))]
    return Conversation(messages=_system(parts) + turns, **parts.origin())


def _text(parts: _Parts) -> Example:
    return Text(text=parts.text("text"), **parts.origin())


def _preference(parts: _Parts) -> Example:
    chosen, rejected = (_answer(parts, part) for part in ("chosen", "rejected"))
    prompt = [] if chosen[0]["role"] != "assistant" else _prompt(parts)
    if not prompt:  # whole conversations: what they share is the prompt
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    where = parts.row.where
    if chosen == rejected:
        raise WhetError("chosen and rejected are the same", where=where, fix="remove the row")
    for part, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
            raise WhetError(
                f"{part} must hold the answer alone, or the whole conversation that both answers share, answer last",
                where=where,
                fix="let chosen and rejected differ in the assistant's turns only",
            )
    if not prompt:
        raise WhetError("there is no prompt before the answers", where=where, fix="add a prompt column")
    return Preference(prompt=_system(parts) + prompt, chosen=chosen, rejected=rejected, **parts.origin())


def _answer(parts: _Parts, part: str) -> list[Message]:
    value = parts.values[part]
    if isinstance(value, list):
        return messages_of(value, part, parts.row.where, roles=SHAREGPT_ROLES)
    return [_assistant(parts.text(part))]


def _prompt(parts: _Parts) -> list[Message]:
    if "prompt" not in parts.values:
        raise _missing("prompt", parts)
    value = parts.values["prompt"]
    if isinstance(value, list):
        return messages_of(value, "prompt", parts.row.where, roles=SHAREGPT_ROLES)
    return [_user(parts.text("prompt"))]


def _system(parts: _Parts) -> list[Message]:
    text = parts.optional_text("system")
    return [] if text is None else [{"role": "system", "content": text}]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class _Format:
    build: Callable[[_Parts], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return self.required + self.optional


FORMATS: dict[str, _Format] = {
    # Either name of the column will do, so neither is required.
    "messages": _Format(_messages, (), ("messages", "conversations", "tools", "system")),
    "sharegpt": _Format(_sharegpt, (), ("conversations", "messages", "tools", "system")),
    "prompt-completion": _Format(_prompt_completion, ("prompt", "completion"), ("system",)),
    "alpaca": _Format(_alpaca, ("instruction", "output"), ("input", "system")),
    "text": _Format(_text, ("text",)),
    "preference": _Format(_preference, ("chosen", "rejected"), ("prompt", "system")),
}
