"""The command that runs all works of the README's table."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.bench.scripts import load

ROOT = Path(__file__).parents[2]
finetune = load("finetune")


def run(folder: Path, *works: str, fails: bool = False) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script with a python that notes down what it is called with; and those lines."""
    (folder / "bin").mkdir()
    stub, calls = folder / "bin" / "python", folder / "calls"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(calls))}\nexit {int(fails)}\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "fused.sh"), str(folder / "out"), *works],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_every_work_is_one_that_finetune_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option that was renamed, and two works that are one."""
    done, calls = run(tmp_path)
    assert done.returncode == 0, done.stderr
    ids = set()
    for call in calls:
        name, *arguments = shlex.split(call)
        assert (ROOT / name).is_file()
        monkeypatch.setattr("sys.argv", [name, *arguments])
        args = finetune.arguments()
        assert args.out == tmp_path / "out" / "fused.jsonl"
        ids.add(args.run_id)
    assert len(ids) == 1
    assert len(set(calls)) == len(calls) >= 14


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "1b", "no-such", "hf-1b", fails=True)
    assert done.returncode == 1
    assert len(calls) == 2
    assert "failed: 1b no-such hf-1b" in done.stderr
