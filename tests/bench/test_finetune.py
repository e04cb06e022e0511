"""bench/finetune.py runs on any machine: the same work on two engines, one line each, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FIELDS = {
    *("kind", "run_id", "engine", "work", "tok_s", "real_tok_s", "step_s", "first_steps_s", "load_s", "load_peak_gib"),
    *("peak_allocated_gib", "peak_reserved_gib", "peak_host_gib", "losses", "hardware", "versions", "commit", "dirty"),
    "date",
}


def finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "finetune.py"), "--model", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of two steps by engine."""
    folder = tmp_path_factory.mktemp("bench")
    shape = ["--bs", "2", "--ga", "2", "--seq", "32", "--steps", "2", "--warm", "1", "--run-id", "test"]
    kept = ["--models", str(folder / "models"), "--out", str(folder / "results" / "tiny.jsonl")]
    found = {}
    for engine in ("hf", "whet"):
        done = finetune("--engine", engine, *shape, *kept)
        assert done.returncode == 0, done.stderr[-2000:]
        found[engine] = json.loads(done.stdout)  # one line and nothing else
    written = (folder / "results" / "tiny.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == list(found.values())
    return found


@pytest.mark.parametrize("engine", ["hf", "whet"])
def test_a_line_says_what_was_measured_and_where(lines: dict[str, dict[str, Any]], engine: str) -> None:
    """Catches a figure that nobody can place afterwards."""
    line = lines[engine]
    assert line.keys() == FIELDS
    assert line["engine"] == engine
    assert line["run_id"] == "test"
    assert len(line["losses"]) == 2
    assert len(line["first_steps_s"]) == 1
    assert line["real_tok_s"] > 0
    assert line["step_s"]["min"] <= line["step_s"]["median"] <= line["step_s"]["max"]
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes"} <= line["versions"].keys()
    assert ("whet" in line["versions"]) == (engine == "whet")


def test_both_engines_do_the_same_work(lines: dict[str, dict[str, Any]]) -> None:
    """Catches a comparison of different data, seeds or shapes: the losses must be the same."""
    assert lines["whet"]["work"] == lines["hf"]["work"]
    assert lines["whet"]["losses"] == pytest.approx(lines["hf"]["losses"], rel=1e-4)


def test_steps_that_leave_nothing_to_time_are_refused() -> None:
    done = finetune("--engine", "whet", "--steps", "3", "--warm", "3")
    assert done.returncode == 2
    assert "--warm must leave" in done.stderr
