"""The watch on a GPU: it waits for nothing, and goes back and on where passes run as CUDA graphs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from whet.recipe import Recipe
from whet.recipe_model import load_for_training
from whet.runs.store import Run
from whet.train import fit as fitting
from whet.train.callbacks import Seals
from whet.train.probe import damaged_weights
from whet.train.watch import Watch, Watching

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH, STEPS = 128, 12


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    train = {"max_steps": STEPS, "tokens_per_step": 4 * LENGTH, "micro_batch": 2, "learning_rate": 1e-3}
    recipe = Recipe.model_validate(
        {
            "name": "watched",
            "model": {"base": str(tiny_llama), "load": "nf4", "max_seq_length": LENGTH},
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "train": {**train, "checkpoint_every": 4, "packing": False},
        }
    )
    return Run(tmp_path, recipe, open(os.devnull, "w"))


def trained(run: Run) -> Any:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 400, (64, LENGTH), generator=generator).tolist()
    model, tokenizer = load_for_training(run.recipe)
    fitting.fit(model, tokenizer, Dataset.from_dict({"input_ids": ids, "labels": ids}), run, Console(quiet=True))
    return model


def test_a_quiet_step_waits_for_nothing(run: Run) -> None:
    """torch itself refuses calls that wait for the GPU here."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # tests before this one reserved more, and gave it back
    held = torch.zeros(1, device="cuda")
    trainer = SimpleNamespace(step_batches=[], train_dataset=None, accelerator=SimpleNamespace(scaler=None))
    watch = Watch(run, trainer, Watching(every=2))
    nothing: Any = SimpleNamespace(fp16=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 40):
            state: Any = SimpleNamespace(global_step=step)
            watch.on_log(nothing, state, nothing, logs={"loss": 2.0 - 0.01 * step, "grad_norm": 0.3})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    looks = run.metrics("watch")
    assert [line["step"] for line in looks] == list(range(2, 40, 2))
    assert all(line["reserved"] >= line["allocated_peak"] >= held.nbytes for line in looks)


class Spoiling(Seals):
    """Breaks the weights once: the gradient of one is NaN at the sixth update, after its norm was measured."""

    updates = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Spoiling.updates += 1
        if Spoiling.updates == 6:
            gradient = next(p.grad for p in kwargs["model"].parameters() if p.grad is not None)
            gradient.fill_(math.nan)


def test_broken_weights_are_put_back_and_training_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a recorded pass that goes on with the broken weights, or with the memory of a trainer that is gone."""
    monkeypatch.setattr(Spoiling, "updates", 0)
    monkeypatch.setattr(fitting, "Seals", Spoiling)
    model = trained(run)
    (line,) = [line for line in run.metrics("watch") if "action" in line]
    assert (line["failed"], line["step"], line["action"]) == (7, 4, "lowered the rate")
    steps = run.metrics("train")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert damaged_weights(model) == []


def test_steps_can_be_left_out_between_recorded_passes(run: Run) -> None:
    """Catches an update with the gradients of the pass before."""
    for place in ([3, 0], [3, 1], [6, 0], [6, 1]):
        run.log(stage="watch", step=place[0], action="skipped", place=place)
    trained(run)
    steps = {step["step"]: step for step in run.metrics("train")}
    assert list(steps) == list(range(1, STEPS + 1))
    for number, step in steps.items():
        assert (step["loss"], step["grad_norm"]) == (0, 0) if number in (3, 6) else step["grad_norm"] > 0
