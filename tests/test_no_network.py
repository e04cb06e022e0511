"""The quickstart opens no socket once it is set up, and the suite's own watch over the network works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.llama_cpp import llama_cpp  # noqa: F401 (a fixture)
from tests.network import OFFLINE
from tests.road import only_run

ROOT = Path(__file__).parents[1]
SPY = """
import os, sys
AF_UNIX = 1
def spy(event, arguments):
    # urllib3, as it is imported, asks whether this machine has IPv6 by a socket that it opens and shuts again
    if event == "socket.bind" and arguments[1] == ("::1", 0):
        return
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        if int(arguments[0].family) == AF_UNIX:
            return
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        return
    with open(os.environ["SPY"], "a") as file:
        file.write(f"{event} {arguments[1:]} by {sys.argv}\\n")
sys.addaudithook(spy)
"""


class Spied:
    """Runs Python where every use of a socket, loopback too, is noted in `notes`, but for one that SPY names."""

    def __init__(self, folder: Path):
        self.folder, self.notes = folder, folder / "sockets"
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SPY)
        paths = [site, ROOT / "src", ROOT]
        # As a user has it: without the switches that the suite sets for itself.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WHET_CONNECTIONS"))}
        self.env = kept | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "SPY": str(self.notes)}

    def __call__(self, *arguments: str | Path, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert done.returncode in codes, done.stderr + done.stdout
        return done.stdout

    def sockets(self) -> str:
        return self.notes.read_text() if self.notes.exists() else ""


@pytest.fixture
def spied(tmp_path: Path) -> Spied:
    return Spied(tmp_path)


def test_the_spy_sees_a_socket(spied: Spied) -> None:
    spied("-c", "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))")
    assert "socket.connect" in spied.sockets()


def test_the_quickstart_opens_no_socket(spied: Spied, tmp_path: Path, llama_cpp: Path) -> None:  # noqa: F811
    """Catches telemetry, checks for new versions and look-ups of a model that is there already; in a short quickstart
    that goes through each of its steps."""
    data = tmp_path / "build" / "quickstart"
    assert "held-out rows of 16 packages" in spied("-m", "quickstart.make_data", data)
    for side, rows in (("train", 64), ("heldout", 4)):
        lines = (data / f"{side}.jsonl").read_text().splitlines(keepends=True)
        (data / f"{side}.jsonl").write_text("".join(lines[:rows]))
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["train"]["max_steps"] = 2
    recipe["eval"]["limit"] = 4
    recipe["export"]["gguf"] = ["q8_0"]  # the proof of a second file asks nobody else
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text(yaml.safe_dump(recipe))
    spied.env["WHET_NODE"] = str(llama_cpp)
    assert "done runs/quickstart-" in spied("-m", "whet.cli", "run", "recipes/quickstart.yaml")
    run = only_run(tmp_path / "runs")
    assert (run / "trained" / "loss.png").stat().st_size > 5_000
    # 1: after two steps the answers are no more than guesses, and 8-bit weights guess otherwise
    assert "q8_0" in spied("-m", "quickstart.answers", run, codes=(0, 1))
    answers = [json.loads(line) for line in (run / "llama_cpp.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    assert spied.sockets() == ""


TRIES = """
import socket
import subprocess
import sys

def test_here():
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
    except OSError:
        pass

def test_in_a_child():
    subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('example.invalid', 80)"])

def test_loopback_is_let_through():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
"""


def test_a_test_that_connects_fails(tmp_path: Path) -> None:
    """The watch over this suite, over a small suite that breaks its rule; a swallowed error changes nothing."""
    (tmp_path / "test_tries.py").write_text(TRIES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([OFFLINE, str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-p", "tests.network", "-q", "-rE", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ERROR test_tries.py::test_here - AssertionError: a connection was tried" in done.stdout
    assert "socket.connect 192.0.2.1" in done.stdout
    assert "ERROR test_tries.py::test_in_a_child - AssertionError: a connection was tried" in done.stdout
    assert "3 passed, 2 errors" in done.stdout


def test_this_suite_is_watched(no_connections: Path) -> None:
    """Catches the watch being lost from tests/conftest.py."""
    import socket

    with pytest.raises(OSError, match="the tests have no network"):
        socket.getaddrinfo("example.invalid", 80)
    assert "example.invalid" in no_connections.read_text()
    no_connections.write_text("")
