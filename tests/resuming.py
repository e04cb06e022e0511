"""A recipe whose run went through in one go, for tests of runs that did not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

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
    unequal = differences(one, other)
    assert not unequal, "\n".join(unequal)
    assert [line["step"] for line in metrics(other)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(one)] == [line["loss"] for line in metrics(other)]


def differences(one: Path, other: Path) -> list[str]:
    """What two runs ended in, and what those of their checkpoints hold that both have, tensor by tensor."""
    found, last = [], Path("trained", "adapter_model.safetensors")
    files = sorted(path.relative_to(one) for path in one.glob("checkpoints/*/adapter_model.safetensors"))
    for file in [*files, last]:
        if file == last or (other / file).exists():
            found += _unequal(str(file), load_file(one / file), load_file(other / file))
        state = file.with_name("optimizer.pt")
        if (one / state).exists() and (other / state).exists():
            found += _unequal(str(state), _moments(one / state), _moments(other / state))
    if not found and (one / last).read_bytes() != (other / last).read_bytes():
        found.append(f"{last}: equal tensors in unequal files")
    return found


def _moments(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, weights_only=True)["state"]
    return {f"{i}.{key}": x for i, values in state.items() for key, x in values.items() if isinstance(x, Tensor)}


def _unequal(file: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    found = []
    for name, x in ours.items():
        x, y = (one.flatten().contiguous().view(torch.uint8).view(-1, one.itemsize) for one in (x, theirs[name]))
        where = (x != y).any(1).nonzero().flatten().tolist()
        if where:
            first = where[0]
            bits = (bytes(one[first].tolist())[::-1].hex() for one in (x, y))
            found.append(f"{file} {name}: {len(where)} of {len(x)}, the first at {first}: {' and '.join(bits)}")
    return found
