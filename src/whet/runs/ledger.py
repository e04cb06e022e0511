"""The ledger: what was done to the runs of a folder, by whom, when, from what and to what. It is only ever added to.

    RUNS/ledger.jsonl       an event a line, each with the SHA-256 of the line before it
    RUNS/ledger.head.json   how many events and bytes there are, and the SHA-256 of the last line

A line that is changed no longer has the digest that the next line, or the head, holds; the same goes for lines that are
removed, added or moved. With a key, every event and the head are signed, so that whoever rewrites all digests still
cannot sign the head. docs/runs.md says what this does not find.

An event is written to the disk before the head says that it counts. After a crash between the two, the ledger holds one
line, or a part of one, that the head does not know: nobody was told that this event was written, so the next append
takes it away, and says so in an event of its own.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from whet.errors import WhetError
from whet.files import refused_when_full, write_text
from whet.runs import signing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NAME = "ledger.jsonl"
NOTHING = "0" * 64
"""What stands for the line before the first."""
LOOK = "look what is wrong: whet runs verify"


@dataclass(frozen=True)
class Event:
    """One line of the ledger.

    seq: its place, from 0. time: UTC, ISO 8601. who: user@host. what: as "trained.done". run: the run's id.
    inputs, outputs: SHA-256 in hex by name. previous: SHA-256 of the line before. signature: base64, over the rest.
    """

    seq: int
    time: str
    who: str
    what: str
    run: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    facts: Mapping[str, Any]
    previous: str
    signature: str | None = None

    @property
    def line(self) -> bytes:
        """As the ledger holds it, without the line's end: ASCII, since other line ends are legal within JSON."""
        return json.dumps(vars(self), allow_nan=False).encode("ascii")

    @property
    def hash(self) -> str:
        """Hex SHA-256 of the line, which names the event."""
        return hashlib.sha256(self.line).hexdigest()

    @property
    def signed_part(self) -> bytes:
        return b"whet event\n" + json.dumps({**vars(self), "signature": None}, allow_nan=False).encode("ascii")


@dataclass(frozen=True)
class Head:
    """The end of a ledger. size: its bytes. start: of them, those before the last line. last: SHA-256 of that line.

    key: fingerprint of the key that signs. signature: base64, over the rest.
    """

    events: int = 0
    size: int = 0
    start: int = 0
    last: str = NOTHING
    key: str | None = None
    signature: str | None = None

    @property
    def text(self) -> str:
        """As its file holds it."""
        return json.dumps(vars(self), indent=1) + "\n"

    @property
    def signed_part(self) -> bytes:
        return b"whet head\n" + json.dumps({**vars(self), "signature": None}).encode("ascii")


@dataclass
class Stage:
    """Work that the ledger tells of. outputs: SHA-256 by name; done: the event at its end."""

    outputs: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    done: Event | None = None


class Ledger:
    """The ledger at `path`, for adding to. Several processes may do so at once.

    key: signs each event; a ledger is signed from its first event on, or never.
    """

    def __init__(self, path: Path, key: Ed25519PrivateKey | None = None):
        self.path, self.key = path, key

    def append(
        self,
        what: str,
        *,
        run: str,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Event:
        """Add an event; it is on the disk when this returns.

        Raises WhetError when it cannot be written (then the ledger is as before), and when the ledger is not as it was
        left: a forged end would become part of the chain.
        """
        try:
            with refused_when_full(self.path), locked(self.path, "r+b") as file:
                head = self._mended(file, self._head(file))
                return self._write(file, head, what, run, inputs or {}, outputs or {}, facts or {})[0]
        except OSError as error:
            fix = "nothing runs without it; look at the disk and at who owns the folder"
            raise WhetError(f"cannot write the ledger: {error.strerror}", where=str(self.path), fix=fix) from error

    @contextmanager
    def stage(
        self,
        name: str,
        *,
        run: str,
        inputs: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Iterator[Stage]:
        """NAME.started before the work within, NAME.done after it, with what was put into `outputs` and `facts`.

        When the first cannot be written, the work does not begin. Work that fails leaves NAME.failed, and Ctrl-C
        NAME.stopped; a killed process neither.
        """
        stage = Stage(facts=dict(facts or {}))
        self.append(f"{name}.started", run=run, inputs=inputs, facts=facts)
        try:
            yield stage
            stage.done = self.append(f"{name}.done", run=run, inputs=inputs, outputs=stage.outputs, facts=stage.facts)
        except BaseException as error:
            ending = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(WhetError):  # what went wrong first is what the user has to know
                self.append(f"{name}.{ending}", run=run, inputs=inputs, facts={"error": type(error).__name__})
            raise

    def _head(self, file: IO[bytes]) -> Head:
        """The head, if the ledger's end is the one it knows and the key is the one that signed it."""
        head = read_head(self.path)
        size = os.fstat(file.fileno()).st_size
        if head is None:
            if size and not is_one_line(file, 0):
                raise self._refusal(f"{head_path(self.path).name} is missing")
            return Head(key=self._fingerprint())
        if fault := end_fault(file, head):
            raise self._refusal(fault)
        if head.key != self._fingerprint():
            raise self._other_key(head)
        if self.key is not None and not signing.holds(head.signature, head.signed_part, self.key.public_key()):
            raise self._refusal("the signature of its head does not hold")
        return head

    def _mended(self, file: IO[bytes], head: Head) -> Head:
        """The head, once what a crash left after the last event is gone."""
        file.seek(head.size)
        if not (rest := file.read()):
            return head
        if not is_one_line(file, head.size):
            raise self._refusal("there are lines after its last event")
        os.ftruncate(file.fileno(), head.size)
        facts = {"bytes": len(rest), "dropped": rest[:2000].decode("utf-8", errors="replace")}
        return self._write(file, head, "ledger.mended", "", {}, {}, facts)[1]

    def _write(
        self,
        file: IO[bytes],
        head: Head,
        what: str,
        run: str,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        facts: Mapping[str, Any],
    ) -> tuple[Event, Head]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = Event(head.events, now, _who(), what, run, dict(inputs), dict(outputs), _plain(facts), head.last)
        if self.key is not None:
            event = replace(event, signature=signing.sign(self.key, event.signed_part))
        line = event.line + b"\n"
        after = Head(head.events + 1, head.size + len(line), head.size, event.hash, head.key)
        if self.key is not None:
            after = replace(after, signature=signing.sign(self.key, after.signed_part))
        try:
            file.seek(head.size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            write_text(head_path(self.path), after.text)
            _sync(self.path.parent)
        except BaseException:
            if not self._counts(after):  # to truncate takes no space, so it works on a disk that is full
                os.ftruncate(file.fileno(), head.size)
            raise
        return event, after

    def _counts(self, head: Head) -> bool:
        """Whether `head` is in its place: Ctrl-C may come when it just was put there."""
        try:
            return read_head(self.path) == head
        except WhetError:
            return False

    def _fingerprint(self) -> str | None:
        return signing.fingerprint(self.key.public_key()) if self.key is not None else None

    def _refusal(self, fault: str) -> WhetError:
        return WhetError(f"the ledger is not as it was left: {fault}", where=str(self.path), fix=LOOK)

    def _other_key(self, head: Head) -> WhetError:
        if head.key is None:
            what, fix = "this ledger was begun without a key", f"unset {signing.VARIABLE}, or use another --runs folder"
        elif self.key is None:
            what, fix = "this ledger is signed, and no key is given", f"set {signing.VARIABLE} to the key {head.key}"
        else:
            what, fix = "this ledger is signed with another key", f"set {signing.VARIABLE} to the key {head.key}"
        return WhetError(what, where=str(self.path), fix=fix)


def events(path: Path) -> Iterator[Event]:
    """The events of a ledger in order, unchecked; none where there is no ledger. Raises WhetError at what is none."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):  # a crash may leave the beginning of a line
                yield parse(line, f"{path}:{number}")


def parse(line: bytes, where: str) -> Event:
    """The event in a line. Raises WhetError unless it is one."""
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        raise WhetError("this line is no event", where=where, fix=LOOK) from None
    if not _is_event(event):
        raise WhetError("this line is no event", where=where, fix=LOOK)
    return event


def head_path(path: Path) -> Path:
    return path.with_name(path.stem + ".head.json")


def read_head(path: Path) -> Head | None:
    """The head of the ledger at `path`; None where there is none. Raises WhetError when it cannot be read."""
    place = head_path(path)
    try:
        text = place.read_text(encoding="utf-8")
        head = Head(**json.loads(text))
        whole = _is_head(head) and head.text == text
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        whole = False
    except OSError as error:
        raise WhetError(f"cannot read the ledger's head: {error.strerror}", where=str(place), fix=LOOK) from None
    if not whole:
        raise WhetError("the ledger's head is damaged", where=str(place), fix=LOOK)
    return head


@contextmanager
def locked(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """The ledger's file, which no other process adds to meanwhile. For reading, several may have it."""
    reading = mode == "rb"
    descriptor = os.open(path, os.O_RDONLY if reading else os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, mode) as file:
        fcntl.flock(file, fcntl.LOCK_SH if reading else fcntl.LOCK_EX)
        yield file


def _sync(folder: Path) -> None:
    """Have the names in `folder` on the disk: a head that goes back to an older one after a power cut is a fault."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def end_fault(file: IO[bytes], head: Head) -> str | None:
    """What is wrong with the ledger's end as the head describes it."""
    if os.fstat(file.fileno()).st_size < head.size:
        return "events are missing at its end"
    if not head.start < head.size:
        return "its head describes no line"
    file.seek(head.start)
    last = file.read(head.size - head.start)
    if not last.endswith(b"\n") or hashlib.sha256(last[:-1]).hexdigest() != head.last:
        return "its last event is not the one that the head knows"
    return None


def is_one_line(file: IO[bytes], start: int) -> bool:
    """Whether what follows `start` is a line or the beginning of one."""
    file.seek(start)
    return b"\n" not in file.read()[:-1]


def _is_event(event: Event) -> bool:
    """Whether the fields have their types. A subclass of int, as a bool is, is no place in the ledger."""
    texts = (event.time, event.who, event.what, event.run, event.previous)
    maps = (event.inputs, event.outputs, event.facts)
    return (
        type(event.seq) is int
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(value, dict) for value in maps)
        and isinstance(event.signature, str | None)
    )


def _is_head(head: Head) -> bool:
    counts = (head.events, head.size, head.start)
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and isinstance(head.last, str)
        and (head.key is None) == (head.signature is None)
    )


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: infinities and what is no number as text, paths too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
