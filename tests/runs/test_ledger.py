"""The ledger: what is written, what is refused, and what a crash leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs.ledgers import EVENTS, KEY, OTHER_KEY, PUBLIC, filled
from whet.errors import WhetError
from whet.runs import ledger as ledgers
from whet.runs.ledger import NAME, NOTHING, Event, Head, Ledger, events, head_path, parse, read_head
from whet.runs.verify import verify


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / NAME)
    made.append("data.done", run="a")
    made.append("trained.done", run="a")
    return made


# ---------------------------------------------------------------- what is written


def test_what_an_event_holds(tmp_path: Path) -> None:
    """Catches an event without its who, when, what and digests, and numbers that JSON does not have."""
    event = Ledger(tmp_path / NAME).append(
        "gate.decided", run="r-1", inputs={"base": "ab"}, outputs={"decision": "cd"}, facts={"gain": float("nan")}
    )
    (line,) = (tmp_path / NAME).read_text().splitlines()
    read = json.loads(line)
    assert read["seq"] == 0
    assert read["previous"] == NOTHING
    assert "@" in read["who"]
    assert read["time"].endswith("+00:00")
    assert (read["what"], read["run"]) == ("gate.decided", "r-1")
    assert (read["inputs"], read["outputs"], read["facts"]) == ({"base": "ab"}, {"decision": "cd"}, {"gain": "nan"})
    assert event.hash == hashlib.sha256(line.encode()).hexdigest()
    assert read_head(tmp_path / NAME) == Head(1, len(line) + 1, 0, event.hash)


def test_each_event_holds_the_one_before(tmp_path: Path) -> None:
    chain = list(events(filled(tmp_path, None)))
    assert [event.seq for event in chain] == list(range(EVENTS))
    assert [event.previous for event in chain[1:]] == [event.hash for event in chain[:-1]]


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "signed"])
def test_an_untouched_ledger_has_no_faults(tmp_path: Path, key: Any) -> None:
    """Catches a check that cries wolf, which is a check that nobody heeds."""
    path = filled(tmp_path, key)
    assert verify(path) == []
    if key:
        assert verify(path, public_key=PUBLIC, every_signature=True) == []


TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(facts=st.dictionaries(TEXTS, VALUES, max_size=4), what=TEXTS)
def test_any_fact_is_one_line_and_read_back_as_it_was(facts: dict[str, Any], what: str) -> None:
    """Catches text that breaks a line in two (U+2028, half a surrogate pair), and floats that change on the way."""
    event = Event(0, "", "", what, "", {}, {}, ledgers._plain(facts), NOTHING)
    assert event.line.isascii()
    assert b"\n" not in event.line
    assert parse(event.line, "here").line == event.line


@given(st.binary(max_size=200) | st.text().map(str.encode) | VALUES.map(lambda v: json.dumps(v).encode()))
def test_what_is_no_event_is_refused_and_nothing_else_happens(line: bytes) -> None:
    with pytest.raises(WhetError, match="no event"):
        parse(line, "here")


@given(st.text() | VALUES.map(json.dumps))
def test_what_is_no_head_is_refused_and_nothing_else_happens(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        head_path(path).write_bytes(text.encode("utf-8", errors="surrogatepass"))
        with pytest.raises(WhetError, match="damaged"):
            read_head(path)


# ---------------------------------------------------------------- refusals


def unchanged(path: Path) -> Callable[[], bool]:
    before = path.read_bytes(), head_path(path).read_bytes()
    return lambda: (path.read_bytes(), head_path(path).read_bytes()) == before


@pytest.mark.parametrize(
    ("done", "told"),
    [
        (lambda path: head_path(path).unlink(), "ledger.head.json is missing"),
        (lambda path: head_path(path).write_text("{}"), "damaged"),
        (lambda path: path.unlink(), "events are missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "events are missing"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"trained", b"exports")), "not the one that the head"),
        (lambda path: path.write_bytes(path.read_bytes() + b"a\nb\n"), "lines after its last event"),
    ],
)
def test_nothing_is_added_to_a_ledger_that_was_changed(ledger: Ledger, done: Any, told: str) -> None:
    """Catches a forged end that becomes part of the chain with the next honest event."""
    done(ledger.path)
    before = ledger.path.read_bytes() if ledger.path.exists() else b""
    with pytest.raises(WhetError, match=told):
        ledger.append("export.done", run="a")
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [(None, KEY, "begun without a key"), (KEY, None, "no key is given"), (KEY, OTHER_KEY, "another key")],
)
def test_a_ledger_is_signed_with_one_key_or_with_none(tmp_path: Path, first: Any, then: Any, told: str) -> None:
    """Catches unsigned events in a signed ledger, which anyone could have added."""
    path = filled(tmp_path, first, 1)
    with pytest.raises(WhetError, match=told):
        Ledger(path, then).append("data.done", run="a")


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("more", [0, 1, 100])
def test_a_full_disk_is_told_and_leaves_the_ledger_as_it_was(ledger: Ledger, more: int) -> None:
    """Catches half an event, after which no other can be written."""
    same_still = unchanged(ledger.path)
    with files_up_to(ledger.path.stat().st_size + more), pytest.raises(WhetError, match="no space left"):
        ledger.append("export.done", run="a")
    assert same_still()
    ledger.append("export.done", run="a")
    assert verify(ledger.path) == []


def test_a_head_that_cannot_be_written_takes_its_event_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an event that was refused to its writer and stands in the ledger all the same."""
    same_still = unchanged(ledger.path)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "write_text", full)
        with pytest.raises(WhetError, match="no space left"):
            ledger.append("export.done", run="a")
    assert same_still()


def test_ctrl_c_after_the_head_is_written_keeps_the_event(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an event that is taken away although the head knows it: the ledger would be shut for good."""

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledgers, "_sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.append("export.done", run="a")
    assert verify(ledger.path) == []
    assert ledger.append("export.done", run="a").seq == 3


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_a_folder_that_may_not_be_written_is_told() -> None:
    """Catches a refusal of the system that ends in a traceback, or in a stage that runs unrecorded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:  # the superuser may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(WhetError, match="not allowed to write"):
                Ledger(folder / NAME).append("data.started", run="a")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_folder_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(WhetError, match="cannot write the ledger"):
        Ledger(tmp_path / NAME).append("data.started", run="a")
    with pytest.raises(WhetError, match="cannot read the ledger"):
        verify(tmp_path / NAME)


# ---------------------------------------------------------------- stages


def test_a_stage_that_cannot_be_told_of_does_not_run(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    ran = []
    with pytest.raises(WhetError), Ledger(tmp_path / NAME).stage("data", run="a"):
        ran.append("work")
    assert ran == []


@pytest.mark.parametrize(
    ("error", "ending"), [(ZeroDivisionError, "failed"), (KeyboardInterrupt, "stopped"), (None, "done")]
)
def test_how_a_stage_ended_is_told(ledger: Ledger, error: Any, ending: str) -> None:
    """Catches a failure that reads as success, and an error's message, which may quote the data, in the ledger."""

    def work() -> None:
        with ledger.stage("data", run="a", inputs={"rows": "ab"}) as stage:
            stage.outputs["train"] = "cd"
            if error:
                raise error("secret")

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    *_, begun, ended = events(ledger.path)
    assert (begun.what, ended.what) == ("data.started", f"data.{ending}")
    assert begun.inputs == ended.inputs == {"rows": "ab"}
    assert ended.outputs == ({} if error else {"train": "cd"})
    assert b"secret" not in ledger.path.read_bytes()


# ---------------------------------------------------------------- crashes and company


@pytest.mark.parametrize("cut", [1, 30, -2, -1, None])
def test_what_a_crash_left_is_taken_away_and_told(ledger: Ledger, cut: int | None) -> None:
    """Catches a ledger that a power cut shuts for good, and one that forgets silently what it took away."""
    chain = list(events(ledger.path))
    lost = replace(chain[-1], seq=2, previous=chain[-1].hash, what="lost").line + b"\n"
    with open(ledger.path, "ab") as file:
        file.write(lost[:cut])
    (fault,) = verify(ledger.path)
    assert "left by a crash" in fault.what
    ledger.append("export.done", run="a")
    *_, mended, last = events(ledger.path)
    assert (mended.what, last.what) == ("ledger.mended", "export.done")
    assert mended.facts["dropped"] == lost[:cut].decode()
    assert verify(ledger.path) == []


APPEND = """
import sys
from pathlib import Path
from whet.runs.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for i in range(int(sys.argv[2])):
    ledger.append("a.done", run="r", facts={"i": i})
    print(i, flush=True)
"""


def appending(path: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPEND, str(path), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    """Catches two events after the same one, and lines that are mixed up."""
    processes = [appending(tmp_path / NAME, 20) for _ in range(2)]
    assert [process.communicate(timeout=120) and process.returncode for process in processes] == [0, 0]
    assert verify(tmp_path / NAME) == []
    assert sorted(event.facts["i"] for event in events(tmp_path / NAME)) == sorted([*range(20)] * 2)


def test_a_killed_writer_loses_no_event_that_it_was_told_of(tmp_path: Path) -> None:
    """Catches an append that returns before its event is on the disk, and a ledger that a kill -9 shuts."""
    path, chance, told = tmp_path / NAME, random.Random(7), 0
    for _ in range(4):
        process = appending(path, 10_000)
        assert process.stdout is not None
        for _ in range(chance.randint(1, 6)):
            process.stdout.readline()
            told += 1
        time.sleep(chance.random() / 50)
        process.send_signal(signal.SIGKILL)
        told += process.communicate()[0].count("\n")
        assert all("left by a crash" in fault.what for fault in verify(path))
        assert sum(event.what == "a.done" for event in events(path)) >= told
    Ledger(path).append("b.done", run="r")
    assert verify(path) == []
