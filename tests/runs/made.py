"""Runs for the tests of this folder: made by the store itself, their stages by a few tensors instead of training."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.road import write_recipe, write_rows
from whet.recipe import Recipe, load
from whet.runs.store import Run


def trained(recipe: Recipe, base: Path, root: Path) -> Run:
    """What `run_recipe` leaves, as far as the store goes: weights that follow from seed and rows."""
    run = Run.open(recipe, base, root, data="da7a")
    rows = (base / "rows.jsonl").read_bytes()

    def train(folder: Path) -> None:
        torch.manual_seed(recipe.seed + len(rows))
        weights = torch.randn(4, 3)
        for step in (1, 2, 3):
            run.log(stage="train", step=step, loss=float(weights.abs().sum()) / step)
        save_file({"lora_A": weights, "lora_B": torch.zeros(3)}, folder / "adapter_model.safetensors")

    def scored(folder: Path) -> None:
        (folder / "answers.jsonl").write_text("{}\n")
        run.log(stage="eval", base={"loss": 2.0}, tuned={"loss": 1.5})

    try:
        run.stage("data", lambda folder: (folder / "rows.arrow").write_bytes(rows) and None)
        run.stage("trained", train)
        run.stage("eval", scored)
        run.stage("export", lambda folder: (folder / "summary.json").write_text("{}") and None)
        (run.folder / "checkpoints" / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        (run.folder / "checkpoints" / "checkpoint-3" / "optimizer.pt").write_bytes(bytes(1000))
    finally:
        run.close()
    return run


def make(folder: Path, changes: Mapping[str, Any] | None = None) -> Run:
    """A finished run of a recipe in `folder`, under `folder`/runs."""
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl")
    return trained(load(write_recipe(folder, changes)), folder, folder / "runs")


def copies(runs: Sequence[Run], folder: Path) -> list[Run]:
    """The same runs in `folder`, which is empty: to be changed, at a fraction of the cost of making them."""
    shutil.copytree(runs[0].folder.parents[1], folder, dirs_exist_ok=True)
    places = [folder / "runs" / run.id for run in runs]
    return [Run(place, run.recipe, open(place / ".lock")) for place, run in zip(places, runs, strict=True)]
