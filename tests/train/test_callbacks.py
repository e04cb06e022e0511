"""What is measured of a step, and the two displays. What a whole training does with them is in test_fit.py."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from whet.train import callbacks
from whet.train.callbacks import Bar, Metrics, StepTimes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until a test moves it."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def test_a_step_is_timed_from_the_end_of_the_one_before_it(clock: SimpleNamespace) -> None:
    """Catches the fetching of rows, which comes before a step begins, left out of its time."""
    times = StepTimes()
    times.on_step_begin()
    clock.seconds += 2.0
    assert times.measure({"num_tokens": 500.0}) == {"seconds": 2.0, "tokens": 500.0}
    clock.seconds += 1.0  # rows are fetched
    times.on_step_begin()
    clock.seconds += 2.0
    assert times.measure({"num_tokens": 900.0}) == {"seconds": 3.0, "tokens": 400.0}


def test_a_checkpoint_and_what_is_done_with_it_are_not_the_steps_time(clock: SimpleNamespace) -> None:
    """Catches a speed that drops at each checkpoint, by the evaluation that other callbacks do there."""
    times = StepTimes()
    times.on_step_begin()
    clock.seconds += 2.0
    times.measure({})
    times.on_save()
    clock.seconds += 60.0
    times.on_step_begin()
    clock.seconds += 2.0
    assert times.measure({}) == {"seconds": 2.0}


def test_tokens_are_right_when_a_run_goes_on(clock: SimpleNamespace) -> None:
    """The trainer's count begins at nothing in a process that goes on with a run."""
    times = StepTimes()
    times.on_step_begin()
    assert times.measure({"num_tokens": 300.0})["tokens"] == 300.0
    assert "tokens" not in times.measure({"num_tokens": 300.0})


def test_what_a_step_leaves_in_the_metrics(tmp_path: Path, clock: SimpleNamespace) -> None:
    logged: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(folder=tmp_path, log=lambda **values: logged.append(values))
    metrics = Metrics(run)
    metrics.on_step_begin()
    clock.seconds += 0.5
    logs = {"loss": 1.5, "grad_norm": 0.2, "num_tokens": 64.0, "train_runtime": 9.0}
    metrics.on_log(None, SimpleNamespace(global_step=1), None, logs=logs)  # type: ignore[arg-type]
    (line,) = logged
    assert line.pop("memory") > 2**20
    assert line == {
        "stage": "train", "step": 1, "loss": 1.5, "grad_norm": 0.2, "num_tokens": 64.0, "seconds": 0.5, "tokens": 64.0,
    }  # fmt: skip
    json.dumps(line)


def test_nothing_makes_the_gpu_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a display or a measure that reads a tensor: each reading waits for all the GPU has still to do."""

    def waits(*args: Any) -> None:
        raise AssertionError("this waits for the GPU")

    for name in ("item", "tolist", "cpu", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    monkeypatch.setattr(torch.cuda, "synchronize", waits)
    monkeypatch.setattr(torch.cuda, "mem_get_info", waits)
    state: Any = SimpleNamespace(max_steps=2, global_step=1)
    bar = Bar(Console(file=io.StringIO(), force_terminal=True, width=80))
    metrics = Metrics(SimpleNamespace(folder=tmp_path, log=lambda **values: None))  # type: ignore[arg-type]
    bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for callback in (metrics, bar):
        callback.on_step_begin()
        callback.on_log(None, state, None, logs={"loss": 1.0, "grad_norm": 0.1})
        callback.on_save()
    bar.on_train_end()


def test_a_terminal_gets_the_view_and_no_lines() -> None:
    """Catches both displays at once."""
    out = io.StringIO()
    bar = Bar(Console(file=out, force_terminal=True, width=80))
    state: Any = SimpleNamespace(max_steps=2, global_step=0)
    bar.on_train_begin(None, state, None)  # type: ignore[arg-type]
    for state.global_step in (1, 2):
        bar.on_log(None, state, None, logs={"loss": 1.25, "learning_rate": 1e-3})
    bar.on_train_end()
    assert "1.2500" in out.getvalue()
    assert "  step 1/2" not in out.getvalue()
