"""Processes of their own that begin with the libraries loaded: importing those takes longer than most tests.

multiprocessing's fork server loads them once, and forks a process for each start. What a new interpreter alone shows,
a name that nobody imported or a socket opened at import, is for tests that start one: test_import.py, test_readme.py,
test_no_network.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import IO, Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["whet.train.trainers", "whet.language_model", "whet.pipeline", "whet.cli", "datasets"])


class Warm:
    """A process that runs `main(*arguments)`, with as much of subprocess.Popen as tests need: text, over pipes."""

    def __init__(
        self, main: Callable[..., Any], *arguments: Any, cwd: Path, env: Mapping[str, str] | None = None
    ) -> None:
        ends = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        inside = [theirs for _, theirs in ends]
        settings = dict(os.environ if env is None else env) | {"OMP_NUM_THREADS": "1"}
        call = main, tuple(map(_plain, arguments)), str(cwd), settings, *inside
        with _server_settings():
            self._process = CONTEXT.Process(target=_child, args=call)
            self._process.start()
        self.stdout, self.stderr = (_text(ours) for ours, _ in ends)
        for end in inside:
            end.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it still says on stdout and on stderr, and waits for its end."""
        said = ["", ""]

        def read(which: int, stream: IO[str]) -> None:
            said[which] = stream.read()
            stream.close()

        readers = [Thread(target=read, args=each, daemon=True) for each in enumerate((self.stdout, self.stderr))]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader in readers:
            reader.join()
        return said[0], said[1]


def run(
    main: Callable[..., Any], *arguments: Any, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run does it, with the output captured."""
    process = Warm(main, *arguments, cwd=cwd, env=env)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess([main.__name__, *map(str, arguments)], process.wait(), out, err)


def script(path: str, *argv: str) -> None:
    """`python path argv...`"""
    sys.argv = [path, *argv]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    runpy.run_path(path, run_name="__main__")


def whet(*argv: str) -> None:
    """`whet argv...`"""
    from whet import cli

    sys.argv = ["whet", *argv]
    cli.main()


def _child(
    main: Callable[..., Any],
    arguments: tuple[Any, ...],
    cwd: str,
    env: Mapping[str, str],
    out: Connection,
    err: Connection,
) -> None:
    import torch

    for pipe, number in ((out, 1), (err, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    main(*arguments)


@contextmanager
def _server_settings() -> Iterator[None]:
    """What libraries read as they are imported: a cache that is not the user's. The rest each child is given."""
    name = "HF_HOME"
    before = os.environ.get(name)
    os.environ[name] = str(Path(tempfile.gettempdir(), "whet-tests-hf"))
    try:
        forkserver.ensure_running()
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _plain(argument: Any) -> Any:
    return str(argument) if isinstance(argument, Path) else argument


def _text(connection: Connection) -> IO[str]:
    stream = os.fdopen(os.dup(connection.fileno()), encoding="utf-8")
    connection.close()
    return stream
