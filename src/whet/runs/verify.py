"""Whether a ledger is as it was written: every line in its place, and the end the one that its head knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from whet.errors import WhetError
from whet.runs import signing
from whet.runs.ledger import NOTHING, Event, Head, end_fault, head_path, is_one_line, locked, parse, read_head

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where: a file, with the line if there is one."""

    where: str
    what: str


@dataclass(frozen=True)
class Anchor:
    """The end of a ledger as someone noted it elsewhere: how many events it had, and the SHA-256 of the last."""

    events: int
    last: str

    def __str__(self) -> str:
        return f"{self.events}:{self.last}"

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """From EVENTS:HASH, as `whet runs verify` prints it. Raises WhetError."""
        events, _, last = text.partition(":")
        if not (events.isascii() and events.isdigit() and int(events) > 0 and len(last) == len(NOTHING)):
            raise WhetError(f"{text!r} is not EVENTS:HASH", where="--since", fix="use what an earlier verify printed")
        return cls(int(events), last)


def verify(
    path: Path,
    *,
    public_key: Ed25519PublicKey | None = None,
    since: Anchor | None = None,
    every_signature: bool = False,
) -> list[Fault]:
    """The faults of the ledger at `path`, in its order; none where all holds.

    public_key: the head must be signed with it. The head's signature covers every event, since each holds the digest of
    the one before. every_signature: check each event's own too, 0.2 ms an event; it tells which are genuine
    where the chain is broken.
    since: the ledger must still hold this event; finds a ledger that was put back to an older state, head and all.
    Raises WhetError when there is no ledger, or it cannot be read.
    """
    try:
        with locked(path, "rb") as file:
            return list(_faults(file, path, public_key, since, every_signature))
    except FileNotFoundError:
        raise WhetError("there is no ledger", where=str(path), fix="name the folder of the runs: --runs") from None
    except OSError as error:
        raise WhetError(f"cannot read the ledger: {error.strerror}", where=str(path), fix="check the path") from None


def _faults(
    file: IO[bytes], path: Path, public_key: Ed25519PublicKey | None, since: Anchor | None, every_signature: bool
) -> Iterator[Fault]:
    head, faults = _head(path)
    yield from faults
    count, noted = 0, since is None
    for count, digest, faults in _lines(file, path, head, public_key if every_signature else None):
        yield from faults
        noted = noted or since == Anchor(count, digest)
    if head is not None:
        yield from _head_faults(file, path, head, count, public_key)
    if not noted:
        yield Fault(str(path), f"it does not hold the event that was noted, {since}")


def _head(path: Path) -> tuple[Head | None, list[Fault]]:
    try:
        head = read_head(path)
    except WhetError as error:
        return None, [Fault(error.where or str(path), error.what)]
    return head, [] if head else [Fault(str(head_path(path)), "the ledger's head is missing")]


def _lines(
    file: IO[bytes], path: Path, head: Head | None, signer: Ed25519PublicKey | None
) -> Iterator[tuple[int, str, list[Fault]]]:
    """(number from 1, SHA-256, what is wrong with it) of each line up to the end that the head knows.

    After a fault the chain is taken up where the line says that it is, so that one fault is told once.
    """
    seq, previous, at = 0, NOTHING, 0
    for number, line in enumerate(file, 1):
        at += len(line)
        if head is not None and at > head.size:
            break
        where, faults = f"{path}:{number}", []
        try:
            event = parse(line, where)
        except WhetError as error:
            faults.append(Fault(where, error.what))
            seq += 1
        else:
            faults += _chain_faults(event, seq, previous, where)
            if signer is not None and not signing.holds(event.signature, event.signed_part, signer):
                faults.append(Fault(where, "its signature does not hold"))
            seq = event.seq + 1
        previous = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
        yield number, previous, faults


def _chain_faults(event: Event, seq: int, previous: str, where: str) -> Iterator[Fault]:
    if event.seq != seq:
        yield Fault(where, f"event {event.seq} stands where {seq} was to be: lines were removed, added or moved")
    elif event.previous != previous:
        yield Fault(where, "the line before it is not the one that it was written after")


def _head_faults(
    file: IO[bytes], path: Path, head: Head, count: int, public_key: Ed25519PublicKey | None
) -> Iterator[Fault]:
    """What is wrong with the end: removed events, lines that nobody was told of, a head that is not the key's."""
    if fault := end_fault(file, head):
        yield Fault(str(path), fault)
    elif count != head.events:
        yield Fault(str(path), f"it has {count:,} events, and its head knows {head.events:,}")
    file.seek(head.size)
    if file.read(1):
        yield Fault(str(path), _after(file, head))
    if public_key is not None and not signing.holds(head.signature, head.signed_part, public_key):
        what = "is not signed" if head.signature is None else "has a signature that is not this key's"
        yield Fault(str(head_path(path)), f"the ledger's head {what}")


def _after(file: IO[bytes], head: Head) -> str:
    if is_one_line(file, head.size):
        return (
            "after the last event is a line that its head does not know: added, or left by a crash, "
            "in which case the next run takes it away and says so"
        )
    return "after the last event are lines that its head does not know"
