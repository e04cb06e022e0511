"""What happened in a study: one JSON object a line, appended and on the disk before anybody is told it is saved.

A vote says left, right, tie or skip as the grader saw it; which system that was, only the study's secret tells. A
later vote of the same grader on the same comparison replaces the earlier one; an undo takes it back. A last line
without its newline was cut off by a crash and was never confirmed: it is dropped. Any other line that cannot be read
is an error, because votes may not get lost quietly.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from whet.errors import WhetError
from whet.evals.ab.study import Study
from whet.files import refused_when_full

Choice = Literal["left", "right", "tie", "skip"]
Role = Literal["owner", "grader"]
MISSING = "bring back a copy, or make the study again in another folder"
NAME_LENGTH = 40
COMMENT_LENGTH = 2000
"""Characters."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    time: str


class Opened(_Event):
    """The first line: the study that the votes are of."""

    what: Literal["opened"] = "opened"
    study: str


class Linked(_Event):
    """A login link was made, for a grader or the owner; it replaces an earlier one. token: SHA-256 in hex."""

    what: Literal["linked"] = "linked"
    role: Role
    name: str
    token: str


class Vote(_Event):
    what: Literal["vote"] = "vote"
    grader: str
    comparison: str
    choice: Choice
    comment: str = ""


class Undone(_Event):
    what: Literal["undone"] = "undone"
    grader: str
    comparison: str


class Closed(_Event):
    what: Literal["closed"] = "closed"


Event: TypeAlias = Annotated[Opened | Linked | Vote | Undone | Closed, Field(discriminator="what")]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class StudyClosed(WhetError):
    """A vote came after the end."""

    def __init__(self) -> None:
        super().__init__("the study is closed")


@dataclass(frozen=True)
class State:
    """What the events add up to. Never changed, so that threads may read one while another comes about.

    tokens: SHA-256 of a link's token -> (role, name). graders: in the order they were added.
    votes: grader -> comparison -> the vote that stands, the latest last. closed: when.
    """

    tokens: Mapping[str, tuple[Role, str]] = field(default_factory=dict)
    graders: tuple[str, ...] = ()
    votes: Mapping[str, dict[str, Vote]] = field(default_factory=dict)
    closed: str | None = None

    def after(self, event: Event) -> State:
        """Raises StudyClosed for a vote after the end, WhetError for one of a grader that nobody added."""
        match event:
            case Linked():
                return self._linked(event)
            case Vote() | Undone():
                return self._voted(event)
            case Closed() if self.closed is None:
                return replace(self, closed=event.time)
        return self

    def _linked(self, event: Linked) -> State:
        who = (event.role, event.name)
        tokens = {token: other for token, other in self.tokens.items() if other != who} | {event.token: who}
        if event.role == "owner" or event.name in self.graders:
            return replace(self, tokens=tokens)
        return replace(self, tokens=tokens, graders=(*self.graders, event.name), votes={**self.votes, event.name: {}})

    def _voted(self, event: Vote | Undone) -> State:
        if self.closed is not None:
            raise StudyClosed
        if event.grader not in self.votes:
            raise WhetError(f"there is no grader {event.grader!r}")
        votes = dict(self.votes[event.grader])
        votes.pop(event.comparison, None)
        if isinstance(event, Vote):
            votes[event.comparison] = event
        return replace(self, votes={**self.votes, event.grader: votes})

    def who(self, token: str) -> tuple[Role, str] | None:
        """(role, name) of whom this token was given to."""
        return self.tokens.get(hashed(token))


def hashed(token: str) -> str:
    """A token has 256 random bits, so that a plain hash cannot be turned round by guessing."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def tidy_name(name: str) -> str | None:
    """Its words with one space between; None where that is empty, too long, or cannot be shown."""
    name = " ".join(name.split())
    return name if 0 < len(name) <= NAME_LENGTH and name.isprintable() else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(path: Path, study: Study) -> State:
    """What the file adds up to, for a reader beside a running server. Raises WhetError for damage."""
    with _readable(path):
        content = path.read_bytes()
    return _state(_whole_lines(content), path, study)


class Log:
    """The file, open for appending. One process at a time, any number of threads.

    Raises WhetError when another process has it open, when it is damaged, or is of another study.
    """

    def __init__(self, path: Path, study: Study, *, new: bool = False):
        self.path, self._lock, self._failed = path, threading.Lock(), False
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if new else 0)
        with refused_when_full(path), _readable(path):
            self._file: BinaryIO = open(os.open(path, flags, 0o600), "r+b", buffering=0)  # noqa: SIM115
        try:
            self._claim()
            lines = _whole_lines(self._file.read())
            self.state = State() if new else _state(lines, path, study)
            self._size = len(b"".join(lines))
            self._cut_back()
            if new:
                self.append(Opened(time=now(), study=study.digest))
                _sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def append(self, event: Event) -> None:
        """Add a line and wait until it is on the disk. When this raises WhetError, nothing was added."""
        line = json.dumps(event.model_dump()).encode() + b"\n"
        with self._lock:
            after = self.state.after(event)
            if self._failed:
                fix = "look after the disk, then start the server again"
                raise WhetError("an earlier line could not be written or taken back", where=str(self.path), fix=fix)
            self._write(line)
            self._size += len(line)
            self.state = after

    def add_link(self, role: Role, name: str) -> str:
        """Make the token of a login link; an earlier one of the same name ends. Raises WhetError for a bad name."""
        if (tidy := tidy_name(name)) is None:
            fix = f"take 1 to {NAME_LENGTH} letters"
            raise WhetError(f"the name {name[:NAME_LENGTH]!r} will not do", where="grader", fix=fix)
        token = secrets.token_urlsafe(32)
        self.append(Linked(time=now(), role=role, name=tidy, token=hashed(token)))
        return token

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            fix = "use the owner's page, or stop the server first"
            raise WhetError("another whet ab has the study open", where=str(self.path), fix=fix) from error

    def _write(self, line: bytes) -> None:
        """All of the line or, should the disk refuse, nothing of it."""
        self._failed = True  # until one of the two is sure
        try:
            with refused_when_full(self.path):
                while line:
                    line = line[self._file.write(line) or 0 :]
                os.fsync(self._file.fileno())
        except BaseException:
            self._cut_back()
            self._failed = False
            raise
        self._failed = False

    def _cut_back(self) -> None:
        """To the last line that was confirmed."""
        self._file.truncate(self._size)
        self._file.seek(self._size)
        os.fsync(self._file.fileno())


def _whole_lines(content: bytes) -> list[bytes]:
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _state(lines: Sequence[bytes], path: Path, study: Study) -> State:
    if not lines:
        raise WhetError("the file is empty", where=str(path), fix=MISSING)
    state = State()
    for number, line in enumerate(lines, 1):
        try:
            event = _EVENT.validate_json(line)
            _check(event, number, study)
            state = state.after(event)
        except ValueError as error:  # pydantic's and ours
            what = f"not as whet ab writes it: {str(error).splitlines()[0]}"
            raise WhetError(what, where=f"{path}:{number}", fix="bring back a copy of the file") from error
    return state


def _check(event: Event, number: int, study: Study) -> None:
    if (number == 1) != isinstance(event, Opened):
        raise ValueError("the first line, and no other, says which study this is")
    if isinstance(event, Opened) and event.study != study.digest:
        raise ValueError("these votes are of another study, or study.json was changed")
    if isinstance(event, Vote | Undone) and event.comparison not in study.comparisons:
        raise ValueError(f"the study has no comparison {event.comparison!r}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise WhetError("the votes are not here", where=str(path), fix=MISSING) from error
    except FileExistsError as error:
        raise WhetError("there are votes already", where=str(path), fix="name another folder") from error


def _sync_folder(folder: Path) -> None:
    """Put a new file's name on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
