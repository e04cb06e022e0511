"""What a judge replies, and the strict reading of it: nothing that is not exactly a verdict becomes a score.

grades       {"correct": {"reason": "...", "grade": 4}, "clear": {...}}
preference   {"reason": "...", "better": "first" | "second" | "tie"}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from whet.evals.judge.settings import Criterion

T = TypeVar("T")
Preference = Literal["first", "second", "tie"]
PREFERENCES: tuple[Preference, ...] = ("first", "second", "tie")


class Malformed(ValueError):
    """A reply that is no verdict; the message says what is wrong with it and quotes none of it."""


@dataclass(frozen=True)
class Mark:
    """A criterion's grade and the judge's reason for it."""

    grade: int
    reason: str


@dataclass(frozen=True)
class Choice:
    """Which answer the judge calls better, and why."""

    better: Preference
    reason: str


@dataclass(frozen=True)
class Form(Generic[T]):
    """Of a reply. schema: JSON schema, within what OpenAI's structured outputs take. read: raises Malformed.

    example: the form for the judge to read. It holds no verdict, towards which judges would lean.
    """

    name: str
    schema: Mapping[str, Any]
    example: str
    read: Callable[[str], T]


def grades_form(criteria: Sequence[Criterion]) -> Form[dict[str, Mark]]:
    """A grade on its scale for each criterion, and no other."""
    parts = {
        criterion.name: _object(reason={"type": "string"}, grade={"type": "integer", "enum": [*criterion.grades]})
        for criterion in criteria
    }

    def read(text: str) -> dict[str, Mark]:
        found = _with_keys(_json_object(text), [criterion.name for criterion in criteria], "the reply")
        return {criterion.name: _mark(found[criterion.name], criterion) for criterion in criteria}

    shown = (f'"{each.name}": {{"reason": "...", "grade": {each.low} to {each.high}}}' for each in criteria)
    return Form("grades", _object(**parts), f"{{{', '.join(shown)}}}", read)


def preference_form() -> Form[Choice]:
    """The better of two answers."""
    schema = _object(reason={"type": "string"}, better={"type": "string", "enum": [*PREFERENCES]})

    def read(text: str) -> Choice:
        found = _with_keys(_json_object(text), ["reason", "better"], "the reply")
        better = next((known for known in PREFERENCES if known == found["better"]), None)
        if better is None:
            raise Malformed('"better" is none of "first", "second", "tie"')
        return Choice(better, _reason(found["reason"]))

    return Form("preference", schema, '{"reason": "...", "better": "first" or "second" or "tie"}', read)


def unwrapped(text: str) -> str:
    """The text without what models put around JSON that no server holds them to: their thoughts, one code fence."""
    text = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", text, re.DOTALL)
    return fenced[1] if fenced and "```" not in fenced[1] else text


def _mark(value: Any, criterion: Criterion) -> Mark:
    name = criterion.name
    found = _with_keys(value, ["reason", "grade"], f'"{name}"')
    grade = found["grade"]
    if type(grade) is not int or grade not in criterion.grades:  # type: True is an int to Python, and no grade
        raise Malformed(f'the grade of "{name}" is no whole number from {criterion.low} to {criterion.high}')
    return Mark(grade, _reason(found["reason"]))


def _reason(value: Any) -> str:
    if not isinstance(value, str):
        raise Malformed('a "reason" is no string')
    return value


def _json_object(text: str) -> Any:
    """All of the text as JSON. Keys that stand twice are refused: which one counts would be the parser's choice."""
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except Malformed:
        raise
    except (ValueError, RecursionError):
        raise Malformed("it is not one JSON object") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Malformed("a key stands twice")
    return found


def _no_constant(name: str) -> float:
    raise Malformed("it is not one JSON object")


def _with_keys(value: Any, keys: Sequence[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{what} is no JSON object")
    if missing := [key for key in keys if key not in value]:
        raise Malformed(f'{what} has no "{missing[0]}"')
    if len(value) > len(keys):
        raise Malformed(f"{what} has other keys than {', '.join(keys)}")
    return value


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
