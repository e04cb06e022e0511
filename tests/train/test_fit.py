"""What stands round the trainer's steps: the terminal, signals, the loss that is no number. Resumption has a file."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.road import prepared, write_recipe, write_rows
from whet import stages
from whet.data.prepare import rows
from whet.errors import WhetError
from whet.recipe import Recipe, load
from whet.recipe_model import load_for_training
from whet.runs.store import Run
from whet.train.callbacks import Bar, OrderlyStop
from whet.train.fit import fit


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_rows(tmp_path / "rows.jsonl")
    return load(write_recipe(tmp_path))


def trained(recipe: Recipe, folder: Path, spoil: bool = False, console: Console | None = None) -> Run:
    version = prepared(recipe, folder)
    run = Run.open(recipe, folder, folder / "runs", version.digest)
    try:
        run.stage("data", lambda staged: stages.make_data(recipe, version, staged, Console(quiet=True)))
        model, tokenizer = load_for_training(recipe)
        if spoil:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        to_train = rows(run.folder / "data", "train")
        fit(model, tokenizer, to_train, run, console or Console(quiet=True))
    finally:
        run.close()
    return run


def test_each_step_is_logged_once_with_its_numbers(recipe: Recipe, tmp_path: Path) -> None:
    steps = trained(recipe, tmp_path).metrics("train")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch"} <= line.keys()
        assert line["grad_norm"] > 0


def test_a_loss_that_is_no_number_stops_and_cleans_up(recipe: Recipe, tmp_path: Path) -> None:
    """Catches a handler of Ctrl-C, or a moving bar, that outlives the training that failed."""
    before = signal.getsignal(signal.SIGINT)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with pytest.raises(WhetError, match="the loss became nan at step 1"):
        trained(recipe, tmp_path, spoil=True, console=terminal)
    assert signal.getsignal(signal.SIGINT) is before
    assert not terminal._live_stack
    assert terminal.file.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.file.getvalue()


def test_the_handler_of_ctrl_c_is_put_back(recipe: Recipe, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    trained(recipe, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_ends_at_once() -> None:
    """Catches a user who can't get out of a step that hangs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    stop = OrderlyStop()
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    stop.on_train_begin()
    try:
        assert stop.on_step_end(None, None, control).should_training_stop is False
        signal.raise_signal(signal.SIGINT)
        assert stop.on_step_end(None, None, control).should_training_stop is True
        assert control.should_save is True
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.on_train_end()
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("steps", "lines"), [(3, 3), (20, 10), (25, 13)])
def test_without_a_terminal_there_are_few_lines(steps: int, lines: int) -> None:
    """Catches a log file of a hundred thousand bars; the last step is always told."""
    out = io.StringIO()
    bar = Bar(Console(file=out, width=80))
    state: Any = SimpleNamespace(max_steps=steps, global_step=0)
    bar.on_train_begin(None, state, None)
    for state.global_step in range(1, steps + 1):
        bar.on_log(None, state, None, logs={"loss": 1.0})
    bar.on_log(None, state, None, logs={"train_runtime": 1.0})
    bar.on_train_end()
    told = [line for line in out.getvalue().splitlines() if line.strip()]
    assert len(told) == lines
    assert told[-1] == f"  step {steps}/{steps}  loss 1.0000"
