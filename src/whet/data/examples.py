"""What every source becomes: a conversation, a text or a preference pair, with where it came from and what it is.

An example's `id` is a digest of its content alone, so equal content has one id in any file, order or machine.

What a person may have written in it is a list of plain strings, its `fields`, which `with_texts` puts back changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from whet.data.json_text import Change, Field, changed, changed_value

Message = dict[str, Any]
"""{"role": system | user | assistant | tool, "content": str}, and what else a chat template reads: tool_calls, name."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """source, line: as in `read.Row`. extra: the row's columns that are no part of the content (customer, date)."""

    source: str
    line: int
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def content(self) -> dict[str, Any]:
        """What the example says, as plain JSON values."""
        raise NotImplementedError

    @cached_property
    def id(self) -> str:
        """SHA-256, in hex, of the content as JSON with sorted keys and no spaces; dates from Parquet as their text."""
        return hashlib.sha256(self.canonical.encode("ascii")).hexdigest()

    @cached_property
    def canonical(self) -> str:
        """The content as ASCII JSON with sorted keys and no spaces."""
        return json.dumps(self.content(), sort_keys=True, separators=(",", ":"), default=str)

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Conversation(Example):
    messages: list[Message]
    tools: list[Any] | None = None

    def content(self) -> dict[str, Any]:
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})


@dataclass(frozen=True, kw_only=True)
class Text(Example):
    text: str

    def content(self) -> dict[str, Any]:
        return {"text": self.text}


@dataclass(frozen=True, kw_only=True)
class Preference(Example):
    """`prompt` is what comes before; `chosen` and `rejected` hold the messages that differ, ending in an answer."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]

    def content(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


UNWRITTEN = {"role", "type", "id", "tool_call_id"}
"""Keys of a message whose values are a program's, not a person's. Inside arguments they are a person's."""
ARGUMENTS = "arguments"
"""Key of what a tool is called with: an object, or the JSON of one in a string."""


def example_of(content: Mapping[str, Any], source: str, line: int) -> Example:
    """The example that has this `content()`."""
    if "text" in content:
        return Text(text=content["text"], source=source, line=line)
    if "chosen" in content:
        return Preference(**content, source=source, line=line)
    return Conversation(**content, source=source, line=line)


def fields(example: Example) -> list[Field]:
    """Every text that a person may have written, in a fixed order: contents of messages, arguments of tool calls.

    Of arguments, and of a text that is JSON as a whole, each value is a field of its own (json_text.py).
    """
    return [each for part in _parts(example) for message in part for each in _fields(message)]


def texts(example: Example) -> list[str]:
    """The texts of the example's `fields`."""
    return [each.text for each in fields(example)]


def with_texts(example: Example, new: Sequence[str]) -> Example:
    """The example with `texts` replaced by as many new ones. What Parquet holds as dates stays.

    JSON in a string keeps every character but those of the values that changed; a number that changed is a string then.
    """
    rest: Iterator[str] = iter(new)
    rewritten = _rewritten(example, lambda _: next(rest))
    if next(rest, None) is not None:
        raise ValueError(f"{len(new)} texts are more than the example has")
    return rewritten


def spoken(example: Example) -> list[str]:
    """What tells the example from others, message by message: all but the system's, which many share.

    Arguments are as they stand, with their keys and numbers: two calls may differ in nothing else.
    """
    messages = (message for part in _parts(example) for message in part if message.get("role") != "system")
    return ["\n".join(_strings(message)) for message in messages]


def _fields(message: Message) -> list[Field]:
    found: list[Field] = []

    def note(each: Field) -> str:
        found.append(each)
        return each.text

    _rewrite(message, note)
    return found


def _parts(example: Example) -> Iterator[Sequence[Message]]:
    if isinstance(example, Conversation):
        yield example.messages
    elif isinstance(example, Preference):
        yield from (example.prompt, example.chosen, example.rejected)
    elif isinstance(example, Text):
        yield [{"content": example.text}]


def _rewritten(example: Example, change: Change) -> Example:
    if isinstance(example, Text):
        return replace(example, text=changed(example.text, change))
    if isinstance(example, Conversation):
        return replace(example, messages=_rewrite(example.messages, change))
    if isinstance(example, Preference):
        prompt, chosen, rejected = (_rewrite(part, change) for part in _parts(example))
        return replace(example, prompt=prompt, chosen=chosen, rejected=rejected)
    raise TypeError(type(example).__name__)


def _rewrite(value: Any, change: Change, key: str = "") -> Any:
    """`value` with every string in it changed, but for those that a program wrote: roles, ids, functions' names."""
    if key == ARGUMENTS:
        return changed_value(value, change)
    if isinstance(value, str):
        return value if key in UNWRITTEN else changed(value, change)
    if isinstance(value, list):
        return [_rewrite(item, change, key) for item in value]
    if isinstance(value, dict):
        return {name: item if _is_name(name, key) else _rewrite(item, change, name) for name, item in value.items()}
    return value


def _strings(value: Any, key: str = "") -> Iterator[str]:
    """Those that `_rewrite` changes, as they stand."""
    if isinstance(value, str):
        if key not in UNWRITTEN:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not _is_name(name, key):
                yield from _strings(item, ARGUMENTS if key == ARGUMENTS else name)


def _is_name(name: str, key: str) -> bool:
    """Whether `name` under `key` is that of a function."""
    return name == "name" and key == "function"
