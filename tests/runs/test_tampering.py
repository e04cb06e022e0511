"""A thousand ways to tamper with a ledger, and that each is found."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs.ledgers import KEY, OTHER_KEY, PUBLIC, filled
from whet.errors import WhetError
from whet.runs import signing
from whet.runs.ledger import NAME, NOTHING, Head, Ledger, head_path, parse, read_head
from whet.runs.verify import Anchor, verify

TAMPERINGS = 250
"""Of each of four kinds: of a plain ledger, of a signed one, and twice by one who makes chain and head fit."""


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("signed"), KEY)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("plain"), None)


class Tampered:
    """A copy of a ledger as an attacker has it who knows the format, and has a key of his own but not ours."""

    def __init__(self, path: Path, chance: random.Random):
        self.lines = path.read_bytes().splitlines(keepends=True)
        self.head, self.chance = head_path(path).read_bytes(), chance

    def flip(self) -> None:
        """A bit of any byte of the ledger or of its head."""
        content = bytearray(b"".join(self.lines) + self.head)
        content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        length = len(content) - len(self.head)
        self.lines, self.head = [bytes(content[:length])], bytes(content[length:])

    def delete(self) -> None:
        start = self.chance.randrange(len(self.lines))
        del self.lines[start : start + self.chance.randint(1, 4)]

    def reorder(self) -> None:
        one, other = self.chance.sample(range(len(self.lines)), 2)
        self.lines[one], self.lines[other] = self.lines[other], self.lines[one]

    def truncate(self) -> None:
        content = b"".join(self.lines)
        self.lines = [content[: self.chance.randrange(len(content))]]

    def forge(self) -> None:
        """Other content of an event, or one more."""
        place = self.chance.randrange(len(self.lines) + 1)
        event = parse(self.lines[min(place, len(self.lines) - 1)], "")
        forged = replace(event, **self.chance.choice([{"what": "gate.ship"}, {"who": "x@y"}, {"facts": {"loss": 0.0}}]))
        self.lines[place : place + 1] = [forged.line + b"\n"]

    def rechain(self) -> None:
        """All digests anew, signatures as they were, of another key, or none; and a head to match."""
        key = self.chance.choice([None, OTHER_KEY])
        keep = self.chance.random() < 0.3
        previous, lines = NOTHING, []
        whole = b"".join(self.lines).splitlines(keepends=True)
        for seq, line in enumerate(line for line in whole if line.endswith(b"}\n")):
            event = replace(parse(line, ""), seq=seq, previous=previous)
            if not keep:
                event = replace(event, signature=signing.sign(key, event.signed_part) if key else None)
            lines.append(event.line + b"\n")
            previous = event.hash
        size = sum(map(len, lines))
        old = Head(**json.loads(self.head))
        signature, fingerprint = (old.signature, old.key) if keep else (None, None)
        head = Head(len(lines), size, size - len(lines[-1]) if lines else 0, previous, fingerprint, signature)
        if key and not keep:
            head = replace(head, key=signing.fingerprint(PUBLIC))
            head = replace(head, signature=signing.sign(key, head.signed_part))
        self.lines, self.head = lines, head.text.encode()

    def write(self, folder: Path) -> Path:
        path = folder / NAME
        path.write_bytes(b"".join(self.lines))
        head_path(path).write_bytes(self.head)
        return path


def same(path: Path, copy: Path) -> bool:
    return path.read_bytes() == copy.read_bytes() and head_path(path).read_bytes() == head_path(copy).read_bytes()


def found(path: Path, **how: Any) -> bool:
    """Whether verification finds it. Only a WhetError counts besides faults: a crash finds nothing."""
    try:
        return bool(verify(path, **how))
    except WhetError:
        return True


KINDS = ["flip", "delete", "reorder", "truncate", "forge"]


def tamper(path: Path, folder: Path, chance: random.Random, *, rechained: bool) -> Iterator[tuple[str, Path]]:
    """TAMPERINGS copies that differ from the ledger, each with what was done to it: as often one way as another."""
    ways = [kind for kind in KINDS if not (rechained and kind == "flip")]
    made = 0
    while made < TAMPERINGS:
        copy, way = Tampered(path, chance), ways[made % len(ways)]
        getattr(copy, way)()
        if rechained:
            copy.rechain()
        written = copy.write(folder)
        if not same(path, written):
            made += 1
            yield way, written


@pytest.mark.parametrize(("key", "seed"), [(None, 1), (PUBLIC, 2)], ids=["plain", "signed"])
def test_every_tampering_is_found(request: Any, tmp_path: Path, key: Any, seed: int) -> None:
    """Catches a check with a hole: by one who changes the ledger, or its head, without redoing the digests."""
    path = request.getfixturevalue("signed" if key else "plain")
    copies = tamper(path, tmp_path, random.Random(seed), rechained=False)
    missed = [what for what, copy in copies if not found(copy, public_key=key)]
    assert missed == []


@pytest.mark.parametrize("every", [False, True], ids=["head", "every signature"])
def test_every_forgery_of_a_signed_ledger_is_found(signed: Path, tmp_path: Path, every: bool) -> None:
    """Catches a check that trusts digests which anyone can redo: this attacker makes chain and head fit."""
    chance = random.Random(3 + every)
    how: dict[str, Any] = {"public_key": PUBLIC, "every_signature": every}
    copies = tamper(signed, tmp_path, chance, rechained=True)
    missed = [what for what, copy in copies if not found(copy, **how)]
    assert missed == []


def test_that_forger_is_found_by_the_signature_alone(signed: Path, tmp_path: Path) -> None:
    """Catches a forger in these tests who does his work badly: then they would show nothing."""
    copies = [found(copy) for _, copy in tamper(signed, tmp_path, random.Random(3), rechained=True)]
    assert copies.count(False) > 0.9 * len(copies)


def test_a_fault_names_its_line(plain: Path, tmp_path: Path) -> None:
    """Catches a report that cannot be acted on, and one change that is told a hundred times."""
    copy = Tampered(plain, random.Random(0))
    copy.lines[4] = copy.lines[4].replace(b"trained", b"exports")
    (fault,) = verify(copy.write(tmp_path))
    assert fault.where.endswith(f"{NAME}:6")
    assert "the line before it" in fault.what
    copy = Tampered(plain, random.Random(0))
    del copy.lines[4:6]
    first, *_ = verify(copy.write(tmp_path))
    assert first.where.endswith(f"{NAME}:5")
    assert "event 6 stands where 4 was to be" in first.what


def test_an_older_state_put_back_is_found_by_what_was_noted(tmp_path: Path) -> None:
    """Catches a rollback of ledger and head together, which is consistent and truly signed."""
    path = filled(tmp_path, KEY, 3)
    old = path.read_bytes(), head_path(path).read_bytes()
    Ledger(path, KEY).append("gate.decided", run="a")
    head = read_head(path)
    assert head is not None
    noted = Anchor.parse(str(Anchor(head.events, head.last)))
    Ledger(path, KEY).append("export.done", run="a")
    assert verify(path, public_key=PUBLIC, since=noted) == []
    path.write_bytes(old[0])
    head_path(path).write_bytes(old[1])
    assert verify(path, public_key=PUBLIC) == []
    (fault,) = verify(path, public_key=PUBLIC, since=noted)
    assert "noted" in fault.what


@pytest.mark.parametrize("text", ["", "3", "x:y", ":" + NOTHING, "0:" + NOTHING, "²:" + NOTHING])
def test_a_note_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(WhetError, match="EVENTS:HASH"):
        Anchor.parse(text)


def test_a_missing_ledger_is_not_a_whole_one(tmp_path: Path) -> None:
    with pytest.raises(WhetError, match="there is no ledger"):
        verify(tmp_path / NAME)


def test_a_forged_past_is_not_signed_with_the_next_event(signed: Path, tmp_path: Path) -> None:
    """Catches a signer who vouches for what he did not write, whatever the forger did about signatures."""
    chance = random.Random(5)
    for _ in range(20):
        copy = Tampered(signed, chance)
        copy.forge()
        copy.rechain()
        path = copy.write(tmp_path)
        with pytest.raises(WhetError):
            Ledger(path, KEY).append("export.done", run="a")
