"""A recipe whose run went through in one go, for tests of runs that did not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tests.road import COLOURS, metrics, only_run, write_recipe, write_rows
from whet.pipeline import run_recipe
from whet.recipe import load

STEPS = 8
CHANGES = {"train.max_steps": STEPS, "train.epochs": 9, "train.checkpoint_every": 2, "model.load": "nf4"}
# The optimizer's 8-bit states are for tensors of 4,096 numbers and more.
EIGHT_BIT = {"train.optimizer": "adamw_8bit", "adapter.r": 16}
# Three steps an epoch, so that a checkpoint falls into its midst, and work enough for a signal to come in time.
ROWS = [
    {"messages": [{"role": "user", "content": f"Name the colour of {i}."}, {"role": "assistant", "content": colour}]}
    for i in range(60)
    for colour in [COLOURS[i * i % 3]]
]
SIZES = {"train.tokens_per_step": 512, "train.micro_batch": 2}
OPTIMIZERS = {"adamw_torch": CHANGES | SIZES, "adamw_8bit": CHANGES | SIZES | EIGHT_BIT}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose run went through in one go."""
    folder = tmp_path_factory.mktemp(request.param)
    write_rows(folder / "rows.jsonl", ROWS)
    write_recipe(folder, OPTIMIZERS[request.param])
    run = run_recipe(load(folder / "recipe.yaml"), folder, folder / "runs", Console(quiet=True))
    epochs = [line["epoch"] for line in run.metrics("train")]
    assert epochs[1] < 1 < epochs[3], "a checkpoint in the midst of an epoch is what this is about"
    return folder


@pytest.fixture
def again(whole: Path, tmp_path: Path) -> Path:
    """The same recipe and rows in another folder, not run yet."""
    for name in ("rows.jsonl", "recipe.yaml"):
        shutil.copy(whole / name, tmp_path)
    return tmp_path


def assert_same_as(whole: Path, folder: Path) -> None:
    one, other = only_run(whole / "runs"), only_run(folder / "runs")
    adapter = Path("trained", "adapter_model.safetensors")
    assert (one / adapter).read_bytes() == (other / adapter).read_bytes()
    assert [line["step"] for line in metrics(other)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(one)] == [line["loss"] for line in metrics(other)]
