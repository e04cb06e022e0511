"""Reads the calls of tools out of what a model writes, while it is being written.

Families of models write them differently; what is looked for:

    <tool_call>{"name": "f", "arguments": {...}}</tool_call>        Hermes, Qwen; several one after the other
    [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]            Mistral, up to the end of the answer
    [TOOL_CALLS]f[ARGS]{...}                                        Mistral since 2025, the same
    <|python_tag|>{"name": "f", "parameters": {...}}                Llama 3, up to the end; `;` between several
    <function=f>{...}</function>                                    Llama 3's other form
    {"name": "f", "parameters": {...}}, or a list of such           an answer that begins with it and holds nothing else

The last is Llama 3.1's usual form, and what is left of the others where an engine drops special tokens. Only names of
tools that were offered count, and only arguments that are an object. What turns out to be no call is given back as
text, to the letter: a model may write about tools.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex

CLOSED_BY = {"<tool_call>": "</tool_call>", "<function=": "</function>"}
TO_THE_END = ("[TOOL_CALLS]", "<|python_tag|>")
MARKERS = (*CLOSED_BY, *TO_THE_END)

BARE = regex.compile(r'\s*(?:\[\s*)?\{\s*"(?:name|type|function|arguments|parameters)"\s*:.*', regex.DOTALL)
"""How an answer begins that may be a call without a marker."""

NAMED = regex.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)")
FUNCTION = regex.compile(r"([\w.-]+)>(.*)", regex.DOTALL)
BETWEEN = " \t\r\n;,"
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Call:
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToolText:
    """Takes an answer's text as it comes, and gives back what is text for certain and the calls that are whole."""

    def __init__(self, names: Collection[str]):
        self._names = frozenset(names)
        self._held = ""
        self._marker: str | None = None
        self._at_start = True
        self._after_call = False

    def feed(self, text: str) -> tuple[str, list[Call]]:
        self._held += text
        return self._take(last=False)

    def finish(self) -> tuple[str, list[Call]]:
        """What is left when the answer ends."""
        return self._take(last=True)

    def _take(self, *, last: bool) -> tuple[str, list[Call]]:
        shown, calls = "", list[Call]()
        while (step := self._step(last)) is not None:
            shown += step[0]
            calls += step[1]
        return shown, calls

    def _step(self, last: bool) -> tuple[str, list[Call]] | None:
        """One part of what is held, or None where more is needed to tell what it is."""
        if not self._held:
            return None
        if self._marker is not None:
            return self._inside(self._marker, last)
        if self._at_start and BARE.fullmatch(self._held, partial=True):
            return self._whole_answer() if last else None
        place, marker = _first_marker(self._held)
        if marker is not None:
            self._marker = marker
            return self._text(place)
        keep = 0 if last else _marker_begun(self._held)
        return self._text(len(self._held) - keep) if len(self._held) > keep else None

    def _text(self, end: int) -> tuple[str, list[Call]]:
        shown, self._held = self._held[:end], self._held[end:]
        self._at_start = self._at_start and not shown.strip()
        if self._after_call:  # white space there is only layout
            shown = shown.lstrip()
            self._after_call = not shown
        return shown, []

    def _whole_answer(self) -> tuple[str, list[Call]]:
        whole, self._at_start = self._held, False
        return self._given(whole, "", _objects(whole))

    def _inside(self, marker: str, last: bool) -> tuple[str, list[Call]] | None:
        closing = CLOSED_BY.get(marker)
        end = self._held.find(closing) if closing else -1
        if end < 0 and not last:
            return None
        inner = self._held[len(marker) : end if end >= 0 else None]
        whole = self._held[: end + len(closing)] if closing and end >= 0 else self._held
        rest = self._held[len(whole) :]
        self._marker, self._at_start = None, False
        return self._given(whole, rest, _function(inner) if marker == "<function=" else _calls_in(inner))

    def _given(self, whole: str, rest: str, objects: Iterator[Any]) -> tuple[str, list[Call]]:
        """The calls in a part of the text, if it holds nothing but calls; else the part itself, as text."""
        self._held = rest
        try:
            calls = [_call(found, self._names) for found in objects]
        except (ValueError, RecursionError):
            calls = []
        if not calls:
            return whole, []
        self._after_call = True
        return "", calls


def forced_schema(tools: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """The JSON Schema of a call of one of these tools: what an answer obeys when a call is required."""
    forms = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": dict(parameters or {"type": "object"})},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in tools.items()
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def _first_marker(text: str) -> tuple[int, str | None]:
    found = [(place, marker) for marker in MARKERS if (place := text.find(marker)) >= 0]
    return min(found, default=(-1, None))


def _marker_begun(text: str) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = max(len(marker) for marker in MARKERS) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in MARKERS):
            return length
    return 0


# ---------------------------------------------------------------- what stands inside; all raise ValueError


def _calls_in(text: str) -> Iterator[Any]:
    """JSON objects, a list of them, or NAME{...}; several with white space, `;` or `,` between."""
    if text.lstrip()[:1] in ("{", "["):
        yield from _objects(text)
        return
    at = 0
    while text[at:].strip(BETWEEN):
        text = text[at:].lstrip(BETWEEN).removeprefix("[TOOL_CALLS]")
        if (name := NAMED.match(text)) is None:
            raise ValueError("no name of a function")
        arguments, at = DECODER.raw_decode(text, name.end())
        yield {"name": name[1], "arguments": arguments}


def _objects(text: str) -> Iterator[Any]:
    at = 0
    while (text := text[at:].lstrip(BETWEEN)).strip():
        value, at = DECODER.raw_decode(text)
        yield from value if isinstance(value, list) else [value]


def _function(text: str) -> Iterator[Any]:
    if (match := FUNCTION.fullmatch(text)) is None:
        raise ValueError("no name of a function")
    yield {"name": match[1], "arguments": json.loads(match[2])}


def _call(found: Any, names: frozenset[str]) -> Call:
    if not isinstance(found, dict):
        raise ValueError("no object")
    function = found["function"] if isinstance(found.get("function"), dict) else found
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    name = function.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        raise ValueError("no call of an offered tool")
    return Call(name, json.dumps(arguments, ensure_ascii=False))
