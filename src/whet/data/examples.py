"""What every source becomes: a conversation, a text or a preference pair, with where it came from and what it is.

An example's `id` is a digest of its content alone, so equal content has one id in any file, order or machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

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
"""Keys of a message whose values are a program's, not a person's."""


def example_of(content: Mapping[str, Any], source: str, line: int) -> Example:
    """The example that has this `content()`."""
    if "text" in content:
        return Text(text=content["text"], source=source, line=line)
    if "chosen" in content:
        return Preference(**content, source=source, line=line)
    return Conversation(**content, source=source, line=line)


def texts(example: Example) -> list[str]:
    """Every text that a person may have written, in a fixed order: contents of messages, arguments of tool calls."""
    return [text for part in _parts(example) for message in part for text in _strings(message)]


def with_texts(example: Example, new: Sequence[str]) -> Example:
    """The example with `texts` replaced by as many new ones. What Parquet holds as dates stays."""
    rest: Iterator[str] = iter(new)
    changed = _rewritten(example, lambda _: next(rest))
    if next(rest, None) is not None:
        raise ValueError(f"{len(new)} texts are more than the example has")
    return changed


def spoken(example: Example) -> list[str]:
    """What tells the example from others, message by message: all but the system's, which many share."""
    messages = (message for part in _parts(example) for message in part if message.get("role") != "system")
    return ["\n".join(_strings(message)) for message in messages]


def _strings(message: Message) -> list[str]:
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _rewrite(message, note)
    return found


def _parts(example: Example) -> Iterator[Sequence[Message]]:
    if isinstance(example, Conversation):
        yield example.messages
    elif isinstance(example, Preference):
        yield from (example.prompt, example.chosen, example.rejected)
    elif isinstance(example, Text):
        yield [{"content": example.text}]


def _rewritten(example: Example, change: Callable[[str], str]) -> Example:
    if isinstance(example, Text):
        return replace(example, text=change(example.text))
    if isinstance(example, Conversation):
        return replace(example, messages=_rewrite(example.messages, change))
    if isinstance(example, Preference):
        prompt, chosen, rejected = (_rewrite(part, change) for part in _parts(example))
        return replace(example, prompt=prompt, chosen=chosen, rejected=rejected)
    raise TypeError(type(example).__name__)


def _rewrite(value: Any, change: Callable[[str], str], key: str = "") -> Any:
    """`value` with every string in it changed, but for those that a program wrote: roles, ids, functions' names."""
    if isinstance(value, str):
        return value if key in UNWRITTEN else change(value)
    if isinstance(value, list):
        return [_rewrite(item, change, key) for item in value]
    if isinstance(value, dict):
        named = {"name"} if key == "function" else set()
        return {name: item if name in named else _rewrite(item, change, name) for name, item in value.items()}
    return value
