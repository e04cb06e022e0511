"""Runs Python that a model wrote, in a process of its own that can do little and ends soon.

What holds it in (Linux):
    namespaces   through `unshare`: no network, not even the machine's own; no sight of other processes; all that it
                 started ends with it
    Landlock     it reads the system and Python, and no file of yours; it writes in its folder alone
    rlimits      processor time, address space, size of a file, open files, processes, no core dumps
    folder       an empty temporary one, which is its HOME and is removed afterwards
    environment  nothing of ours: no keys, no PYTHONPATH; Python runs isolated (-I), without the user's packages
    time         after `seconds` the whole group is killed

What does not: the kernel and Python are all that stands between it and the machine; run evaluations of models you do
not trust as a user who owns nothing, or in a container or virtual machine. The limit on processes does not bind root.
Nothing but the disk limits its files in sum. Packages beside Python can be read and imported.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from whet.errors import WhetError
from whet.evals.scorers.sandbox_child import landlock_version

UNSHARE = ("--user", "--map-current-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
CHILD = Path(__file__).with_name("sandbox_child.py")
SHOWN = 2000
"""Characters kept of what the program wrote last."""
GRACE = 1.0
"""Seconds beyond the limit on processor time, for the processes to start."""


@dataclass(frozen=True)
class Limits:
    """seconds: of wall-clock and of processor time. memory, file: bytes a process, a file."""

    seconds: float = 10.0
    memory: int = 1 << 30
    file: int = 16 << 20
    processes: int = 32
    open_files: int = 64


@dataclass(frozen=True)
class Ran:
    """code: exit status, negative for a signal; None where the time was up. out, err: the ends of what it wrote."""

    code: int | None
    out: str
    err: str


def run_python(program: str, limits: Limits, *, isolated: bool = True) -> Ran:
    """Run `program` to its end, or to that of its time.

    isolated: refuse to run it where network or files can't be taken away from it. Raises WhetError then, and where the
    system can't start processes at all.
    """
    if isolated and (reason := isolation()) is not None:
        fix = "evaluate on a Linux that permits both; or accept it, as: isolation: best-effort"
        raise WhetError(f"the model's code would have more within reach than it may: {reason}", where="scorer", fix=fix)
    start = [shutil.which("unshare") or "", *UNSHARE] if network_within_reach() is None else []
    with TemporaryDirectory(prefix="whet-sandbox-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        work = folder / "work"
        work.mkdir()
        (folder / "program.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        numbers = [limits.seconds, limits.memory, limits.file, limits.processes, limits.open_files]
        numbers.append(int(files_within_reach() is None))
        command = [
            *start,
            sys.executable,
            "-I",
            "-S",
            str(CHILD),
            *map(str, numbers),
            sys.prefix,
            str(folder / "program.py"),
        ]
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            code = _run(command, work, out.fileno(), err.fileno(), limits.seconds + GRACE)
        return Ran(code, _end(folder / "out"), _end(folder / "err"))


def isolation() -> str | None:
    """What can't be taken away from a process here, and why; None where all can."""
    return "; ".join(reason for reason in (network_within_reach(), files_within_reach()) if reason) or None


@cache
def network_within_reach() -> str | None:
    """Why the network can't be taken away, in words; None where it can."""
    found = shutil.which("unshare")
    if sys.platform != "linux" or found is None:
        return "the network (namespaces are made by `unshare` of util-linux, which is not here)"
    tried = subprocess.run([found, *UNSHARE, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"the network (`unshare` is not permitted: {tried.stderr.strip()})"


@cache
def files_within_reach() -> str | None:
    """Why your files can't be taken away, in words; None where they can."""
    if sys.platform == "linux" and landlock_version() > 0:
        return None
    return "your files (the kernel has no Landlock, or does not let it be used)"


def _run(command: list[str], folder: Path, out: int, err: int, seconds: float) -> int | None:
    """The exit status; None where the time was up. Whatever it has started is killed."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder), "LANG": "C.UTF-8"}
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    except OSError as error:
        raise WhetError(f"no process could be started: {error}", where="scorer", fix="free some memory") from error
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _kill(process)
    return process.returncode


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The group, also when its first process has ended by itself and left others."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(path: Path) -> str:
    """The last characters of a file, of which the program may have written much, and anything."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4 * SHOWN))
        return file.read().decode("utf-8", "replace")[-SHOWN:]
