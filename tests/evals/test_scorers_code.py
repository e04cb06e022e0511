"""Code that a model wrote: what its sandbox keeps it from, and answers that would be counted as right."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from whet.errors import WhetError
from whet.evals.models import Prompt
from whet.evals.scorers import KINDS, sandbox
from whet.evals.scorers.base import Question, Score
from whet.evals.scorers.code import code_of
from whet.evals.scorers.sandbox import Limits, Ran, isolation, run_python

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b"
isolated = pytest.mark.skipif(
    isolation() is not None and not os.environ.get("WHET_CI"), reason=f"NOT TESTED, no sandbox here: {isolation()}"
)


def score(answer: str, *references: str, tests: str | None = TESTS, **options: Any) -> Score:
    kind = KINDS["code"]
    made = kind.build(kind.options.model_validate({"isolation": "best-effort", "seconds": 20.0} | options), Path())
    asked = Question("q", Prompt(text="def add(a, b):\n"), references, extra={} if tests is None else {"tests": tests})
    made.check(asked)
    return made.score([asked], [answer])[0]


def ran(program: str, **limits: Any) -> Ran:
    return run_python(program, Limits(**{"seconds": 20.0} | limits), isolated=False)


@pytest.mark.parametrize(
    ("answer", "worth", "note"),
    [
        (RIGHT, 1, None),
        (f"Here you are:\n```python\n{RIGHT}\n```\nIt adds.", 1, None),
        ("def add(a, b):\n    return a - b", 0, "AssertionError"),
        ("def add(a, b:", 0, "SyntaxError"),
        ("", 0, "NameError"),
        (f"{RIGHT}\nimport sys; sys.exit(0)", 0, "before its tests"),
        (f"{RIGHT}\nimport os; os._exit(0)", 0, "before its tests"),
        (f"{RIGHT}\nprint('\\0', end='')", 1, None),
    ],
)
def test_an_answer_is_right_when_its_tests_come_to_their_end(answer: str, worth: float, note: str | None) -> None:
    """Catches an exit status of 0 that is taken for tests that passed."""
    found = score(answer)
    assert found.value == worth, found
    assert note is None or note in str(found.note)


def test_a_program_is_right_when_it_prints_the_reference() -> None:
    assert score("print(6 * 7)", "41", "42", tests=None).value == 1
    assert score("print(6 * 7)", "43", tests=None).value == 0
    with pytest.raises(WhetError, match="neither tests nor a reference"):
        score("print(1)", tests=None)


def test_a_program_may_begin_in_the_prompt() -> None:
    assert score("    return a + b", prefix="prompt").value == 1


def test_code_is_taken_out_of_the_first_block() -> None:
    assert code_of("```py\na\n```\n```\nb\n```") == "a\n"
    assert code_of("a = '```'") == "a = '```'"


# ---------------------------------------------------------------- what it may not do


def test_it_ends_when_its_time_is_up() -> None:
    """Catches a program that waits, one that computes, and one whose children outlive it."""
    assert ran("import time; time.sleep(60)", seconds=0.5).code is None
    assert ran("while True: pass", seconds=1.0).code != 0


def test_children_end_with_it(tmp_path: Path) -> None:
    """Catches a process that an answer leaves behind, with the parent gone or the time up."""
    child = f"import os, time\nif os.fork() == 0:\n    time.sleep(1.5)\n    open({str(tmp_path / 'late')!r}, 'w')\n"
    assert ran(child).code == 0
    assert ran(child + "time.sleep(30)", seconds=1.0).code is None
    threading.Event().wait(2)
    assert not (tmp_path / "late").exists()


def test_it_gets_no_more_memory_than_it_may() -> None:
    found = ran("x = bytearray(1 << 30)", memory=256 << 20)
    assert found.code != 0
    assert "MemoryError" in found.err


def test_it_writes_no_file_larger_than_it_may() -> None:
    """Catches a disk filled by one file, and an error that fills it by printing."""
    assert ran("open('big', 'wb').write(b'x' * (2 << 20))", file=1 << 20).code != 0
    found = ran("while True: print('x' * 4096)", file=1 << 20, seconds=10.0)
    assert found.code != 0
    assert len(found.out) <= sandbox.SHOWN


@pytest.mark.skipif(os.geteuid() == 0, reason="NOT TESTED: Linux does not hold root to a number of processes")
def test_it_starts_no_more_processes_than_it_may() -> None:
    assert "BlockingIOError" in ran("import os\nwhile os.fork(): pass", processes=8).err


def test_it_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a key that an answer could print."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.setenv("PYTHONPATH", "/planted")
    found = ran("import os, sys\nprint(dict(os.environ), sys.path, os.getcwd(), os.listdir())")
    assert found.code == 0
    assert "planted" not in found.out
    assert found.out.rstrip().endswith("/work []")


def test_what_it_writes_is_removed() -> None:
    found = ran("import os\nopen('made', 'w').write('x')\nprint(os.getcwd(), end='')")
    assert found.code == 0
    assert not Path(found.out).exists()


@isolated
@pytest.mark.parametrize(("kind", "send"), [("SOCK_STREAM", "connect(to)"), ("SOCK_DGRAM", "sendto(b'x', to)")])
def test_it_reaches_no_network(kind: str, send: str) -> None:
    """Catches a sandbox that lets a program talk to a server, even one on this machine, over TCP or UDP."""
    with socket.socket(socket.AF_INET, getattr(socket, kind)) as server:
        server.bind(("127.0.0.1", 0))
        program = f"import socket\nto = {server.getsockname()!r}\nsocket.socket(type=socket.{kind}).{send}"
        found = run_python(program, Limits(seconds=20.0))
    assert found.code != 0
    assert "Network is unreachable" in found.err or "Permission denied" in found.err


@isolated
def test_it_sees_no_other_process() -> None:
    found = run_python("import os\nprint([n for n in os.listdir('/proc') if n.isdigit()])", Limits(seconds=20.0))
    assert found.code == 0, found.err
    assert str(os.getpid()) not in found.out
    assert run_python(f"import os; os.kill({os.getpid()}, 0)", Limits(seconds=20.0)).code != 0


@isolated
def test_it_reads_and_writes_no_file_of_ours(tmp_path: Path) -> None:
    """Catches a key or a training row that an answer could read, and a file of ours that it could spoil."""
    mine = tmp_path / "mine"
    mine.write_text("secret")
    new = str(tmp_path / "new")
    for program in (
        f"print(open({str(mine)!r}).read())",
        f"open({str(mine)!r}, 'w')",
        f"open({new!r}, 'w')",
        f"import os; os.mkdir({new!r})",
        f"import os; os.symlink({str(mine)!r}, 'link'); print(open('link').read())",
        f"import os; os.remove({str(mine)!r})",
        f"import os; os.listdir({str(tmp_path)!r})",
        f"import os; os.execv('/bin/cat', ['cat', {str(mine)!r}])",
    ):
        found = run_python(program, Limits(seconds=20.0))
        assert found.code != 0, program
        assert "ermission denied" in found.err, program
        assert "secret" not in found.out
    assert mine.read_text() == "secret"
    assert not Path(new).exists()


@isolated
def test_it_may_do_what_programs_do() -> None:
    """Catches a sandbox in which right answers fail: modules, temporary files, other programs, compiled extensions."""
    program = (
        "import collections, ctypes, decimal, json, math, random, sqlite3\n"
        "import statistics, subprocess, tempfile, threading\n"
        "import numpy\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    open(folder + '/a', 'w').write('x')\n"
        "thread = threading.Thread(target=print); thread.start(); thread.join()\n"
        "print(subprocess.run(['/bin/echo', 'said'], capture_output=True, text=True).stdout)\n"
    )
    found = run_python(program, Limits(seconds=30.0, memory=4 << 30))
    assert found.code == 0, found.err
    assert "said" in found.out


@pytest.mark.parametrize(
    ("probe", "broken", "what"),
    [(sandbox.network_within_reach, ("UNSHARE", ("--no-such-option",)), "the network"),
     (sandbox.files_within_reach, ("landlock_version", lambda: 0), "your files")],
)  # fmt: skip
def test_without_a_sandbox_it_does_not_run_unless_that_is_accepted(
    monkeypatch: pytest.MonkeyPatch, probe: Any, broken: tuple[str, Any], what: str
) -> None:
    """Catches a machine that forbids namespaces or has no Landlock, where code runs unconfined and nobody is told."""
    monkeypatch.setattr(sandbox, *broken)
    probe.cache_clear()
    try:
        with pytest.raises(WhetError, match=what):
            score(RIGHT, isolation="required")
        found = score(RIGHT)
        assert found.value == 1
        assert f"within its reach: {what}" in str(found.note)
    finally:
        monkeypatch.undo()
        probe.cache_clear()
