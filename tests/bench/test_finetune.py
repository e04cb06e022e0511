"""bench/finetune.py runs on any machine: the same work on two engines, one line each, in a process of its own.

The one without whet is a new interpreter, in which nothing has loaded whet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tests import warm
from tests.bench.scripts import load

ROOT = Path(__file__).parents[2]
FIELDS = {
    *("kind", "run_id", "engine", "work", "tok_s", "real_tok_s", "step_s", "first_steps_s", "load_s", "load_peak_gib"),
    *("peak_allocated_gib", "peak_reserved_gib", "peak_host_gib", "losses", "hardware", "versions", "commit", "dirty"),
    "date",
}


SHAPE = ["--bs", "2", "--ga", "2", "--seq", "32", "--steps", "2", "--warm", "1", "--run-id", "test"]
SCRIPT = str(ROOT / "bench" / "finetune.py")


def finetune(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--model", "tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def finetune_whet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(warm.script, SCRIPT, "--model", "tiny", "--engine", "whet", *arguments, cwd=ROOT)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The result of two steps by engine."""
    folder = tmp_path_factory.mktemp("bench")
    kept = ["--models", str(folder / "models"), "--out", str(folder / "results" / "tiny.jsonl")]
    ended = {"hf": finetune("--engine", "hf", *SHAPE, *kept), "whet": finetune_whet(*SHAPE, *kept)}
    for done in ended.values():
        assert done.returncode == 0, done.stderr[-2000:]
    found = {engine: json.loads(done.stdout) for engine, done in ended.items()}  # one line and nothing else
    written = (folder / "results" / "tiny.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == list(found.values())
    return found


@pytest.mark.parametrize("engine", ["hf", "whet"])
def test_a_line_says_what_was_measured_and_where(lines: dict[str, dict[str, Any]], engine: str) -> None:
    """Catches a figure that nobody can place afterwards."""
    line = lines[engine]
    assert line.keys() == (FIELDS | {"plan"} if engine == "whet" else FIELDS)
    assert line["engine"] == engine
    assert line["work"]["compute"] == "bf16"
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


def test_fp8_is_refused_for_other_engines() -> None:
    """Catches a line that says fp8 and was measured in bf16."""
    done = finetune("--engine", "hf", "--compute", "fp8")
    assert done.returncode == 2
    assert "--compute fp8 is whet's alone: leave it out for hf" in done.stderr


class Loader:
    """Stands for whet's FastLanguageModel: keeps what it is called with."""

    given: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, folder: str, **options: Any) -> tuple[str, str]:
        cls.given = options
        return "model", "tokenizer"

    @staticmethod
    def get_peft_model(model: str, **options: Any) -> str:
        return model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"use_gradient_checkpointing": "whet"}),
        (["--compute", "fp8", "--gc", "off"], {"use_gradient_checkpointing": False, "compute": "fp8"}),
        (
            ["--compute", "fp8", "--gpu-memory", "21"],
            {"use_gradient_checkpointing": "auto", "gpu_memory": 21.0, "compute": "fp8"},
        ),
    ],
)
def test_whet_is_loaded_as_asked(options: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a --compute or --gpu-memory that is written in the line and never reaches the model."""
    bench = load("finetune")
    monkeypatch.setattr("whet.FastLanguageModel", Loader)
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--engine", "whet", *options])
    args = bench.arguments()
    bench.load_whet(Path("here"), args, torch.float32)
    fixed = ("max_seq_length", "dtype", "load_in_4bit", "full_finetuning")
    assert {name: value for name, value in Loader.given.items() if name not in fixed} == expected


def test_the_plan_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that was made and is not in the line, or a link in other units."""
    bench = load("finetune")
    shared = SimpleNamespace(plan="8 rows at a time, once a step; everything kept")
    monkeypatch.setattr("whet.models.fused.shared_of", lambda model: shared)
    monkeypatch.setattr("whet.plan.fit.device_rates", lambda device: SimpleNamespace(link=55.04e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.plan_of(None) == {"chosen": shared.plan, "link_gb_s": 55.0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("whet.models.fused.shared_of", lambda model: None)
    assert bench.plan_of(None) == {"chosen": None, "link_gb_s": None}


def test_a_line_is_shown_with_and_without_its_plan(lines: dict[str, dict[str, Any]]) -> None:
    """Catches a table or a picture that takes new lines alone, or old ones alone."""
    table, pareto = load("table"), load("pareto")
    line = lines["whet"] | {"peak_allocated_gib": 1.0}
    older = {name: value for name, value in line.items() if name != "plan"}
    older["work"] = {name: value for name, value in line["work"].items() if name != "compute"}
    rows = table.render([line, older]).splitlines()[2:4]
    assert rows[0] == rows[1]
    (points,) = pareto.panels([line, older]).values()
    assert points[0] == points[1]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run with --trace: its line, and the file of the profiled step."""
    folder = tmp_path_factory.mktemp("trace")
    done = finetune_whet(*SHAPE, "--models", str(folder / "models"), "--trace", str(folder / "traces"))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), json.loads((folder / "traces" / "whet.json").read_text())


def test_profiled_steps_come_on_top_of_the_timed_ones(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Catches figures that hold the profiler's own time."""
    line, trace = traced
    assert line.keys() == FIELDS | {"plan"}
    assert len(line["losses"]) == 2
    assert line["step_s"]["min"] == line["step_s"]["max"]  # of the one step after the warm one
    assert line["real_tok_s"] == pytest.approx(2 * 2 * 32 / line["step_s"]["median"], rel=0.01)
    assert trace["timed_ms"] == pytest.approx(line["step_s"]["median"] * 1e3, abs=0.1)


def test_the_trace_is_of_one_step(traced: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Catches a trace of no step, of two, or of the work between steps; and one that nobody can place."""
    line, trace = traced
    assert {name: trace[name] for name in ("run_id", "engine", "work")} == {
        name: line[name] for name in ("run_id", "engine", "work")
    }
    assert 0 < trace["busy_us"] <= trace["wall_us"] < 20 * trace["timed_ms"] * 1e3
    counts: dict[str, int] = {}
    for kernel in trace["kernels"]:
        counts[kernel["name"]] = counts.get(kernel["name"], 0) + kernel["count"]
    assert counts["LinearLogProbs"] == 2  # once a micro-batch
    products = [k for k in trace["kernels"] if k["name"] == "aten::mm" and k["dims"]]
    assert any(trace["vocabulary"] in sizes for k in products for sizes in k["dims"])
