"""An example as the checks look at it: what is asked, what is answered, and all that is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from whet.data.doctor.findings import Place, excerpt
from whet.data.examples import Conversation, Example, Message, Preference, spoken, texts

INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]+")
SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Row:
    """show: the places made of this row hold an excerpt of its text."""

    example: Example
    show: bool = False

    @property
    def where(self) -> str:
        return self.example.where

    @cached_property
    def messages(self) -> Sequence[Message]:
        """A conversation's, or a pair's with the answer it prefers; none of a text."""
        if isinstance(self.example, Conversation):
            return self.example.messages
        if isinstance(self.example, Preference):
            return [*self.example.prompt, *self.example.chosen]
        return []

    @cached_property
    def said(self) -> str:
        """What duplicates go by: all messages but the system's."""
        return "\n".join(self.parts)

    @cached_property
    def parts(self) -> list[str]:
        """The same, message by message."""
        return spoken(self.example)

    @cached_property
    def texts(self) -> list[str]:
        return texts(self.example)

    @cached_property
    def answers(self) -> list[str]:
        """The contents of the assistant's turns, but for those that call a tool without a word."""
        return [
            str(message["content"])
            for message in self.messages
            if message["role"] == "assistant" and not (message.get("tool_calls") and not message["content"])
        ]

    @property
    def answer(self) -> str | None:
        """The last one."""
        return self.answers[-1] if self.answers else None

    @cached_property
    def before(self) -> Sequence[Message]:
        """The messages before the last answer."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.messages[: turns[-1]] if turns else []

    @cached_property
    def prompt(self) -> str | None:
        """All before the last answer, with who says it; None where nothing is."""
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.before) or None

    @cached_property
    def question(self) -> str | None:
        """The user's last turn before the last answer."""
        asked = [str(message["content"]) for message in self.before if message["role"] == "user"]
        return asked[-1] if asked else None

    def place(self, text: str = "", start: int = 0, end: int = 0, *, detail: str = "") -> Place:
        """The row, and what of `text` is meant, if texts are to be shown."""
        return Place(self.where, detail, excerpt(text, start, end) if self.show else "")


def folded(text: str) -> str:
    """Texts that differ in case and spaces alone come out equal."""
    return SPACE.sub(" ", text).strip().casefold()


def is_blank(text: str) -> bool:
    """Nothing but spaces and characters of no width."""
    return not INVISIBLE.sub("", text)


def places(rows: Iterable[Row]) -> tuple[Place, ...]:
    return tuple(row.place(row.said) for row in rows)
