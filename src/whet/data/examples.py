"""What every source becomes: a conversation, a text or a preference pair, with where it came from and what it is.

An example's `id` is a digest of its content alone, so equal content has one id in any file, order or machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"), default=str)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

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
