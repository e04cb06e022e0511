"""A run that was killed, or stopped by Ctrl-C, goes on to the very weights it would have had."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from tests.forked import Forked
from tests.road import COLOURS, Here, metrics, only_run, start, write_recipe, write_rows
from whet.pipeline import run_recipe
from whet.recipe import load

STEPS = 8
SEED = time.time_ns()  # of the moments to kill at: other ones each time
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


def run_until(folder: Path, step: int, end: int) -> None:
    """Start the run and send it the signal `end` once `step` steps are in its metrics."""
    process = start("run", "recipe.yaml", cwd=folder)
    deadline = time.monotonic() + 120
    while not any(path.read_text().count("\n") >= step for path in folder.glob("runs/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(end)
    out, err = process.communicate(timeout=120)
    run = only_run(folder / "runs")
    assert not (run / "trained").exists()
    assert "Traceback" not in out + err
    if end == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "to go on: whet run recipe.yaml" in err
        stopped = metrics(run)[-1]["step"]
        assert f"stopped after step {stopped}" in err
        assert (run / "checkpoints" / f"checkpoint-{stopped}" / "sealed.json").exists()


def assert_same_as(whole: Path, folder: Path) -> None:
    one, other = only_run(whole / "runs"), only_run(folder / "runs")
    adapter = Path("trained", "adapter_model.safetensors")
    assert (one / adapter).read_bytes() == (other / adapter).read_bytes()
    assert [line["step"] for line in metrics(other)] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in metrics(one)] == [line["loss"] for line in metrics(other)]


@pytest.mark.parametrize("whole", ["adamw_torch"], indirect=True)
def test_a_killed_run_ends_in_the_same_weights(whole: Path, again: Path, here: Here) -> None:
    """Catches state that no checkpoint keeps: the optimizer's moments, dropout's generator, the place in the rows."""
    run_until(again, 3, signal.SIGKILL)
    assert (only_run(again / "runs") / "checkpoints" / "checkpoint-2" / "sealed.json").exists()
    done = here("run", "recipe.yaml", cwd=again)
    assert done.code == 0, done.err
    assert "step 1/" not in done.out, "training began anew"
    assert_same_as(whole, again)

    third = here("run", "recipe.yaml", cwd=again)
    assert third.code == 0
    assert "step" not in third.out.replace("steps 8", "")
    assert third.out.count("(done before)") == 3
    assert len(metrics(only_run(again / "runs"))) == STEPS


@pytest.mark.parametrize("whole", ["adamw_8bit"], indirect=True)
def test_killed_twenty_times_at_random(whole: Path, again: Path) -> None:
    """Catches a moment that leaves something half written: ten kills at any time, ten while a checkpoint is written."""
    chance = random.Random(SEED)
    forked = Forked(again)
    writing = 0
    try:
        for kill in range(20):
            process = forked.start()
            if kill % 2 and is_writing(again, since=time.time()):
                writing += 1
                time.sleep(chance.uniform(0, 0.05))
            else:
                time.sleep(chance.uniform(0, 1.2))
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            assert forked.end() in (0, -signal.SIGKILL)
        forked.start()
        assert forked.end() == 0
    finally:
        forked.close()
    assert writing >= 5
    assert_same_as(whole, again)


def test_a_run_killed_after_its_last_checkpoint_trains_no_more(whole: Path, again: Path, here: Here) -> None:
    """Catches the trainer's step too many when it goes on from a training that was at its end."""
    run = only_run(shutil.copytree(whole / "runs", again / "runs"))
    shutil.rmtree(run / "trained")
    shutil.rmtree(run / "export")
    done = here("run", "recipe.yaml", cwd=again)
    assert done.code == 0, done.err
    assert f"step {STEPS}/" not in done.out
    assert_same_as(whole, again)


def is_writing(folder: Path, since: float) -> bool:
    """Waits for a checkpoint that was begun after `since` and has no seal yet; False where none comes."""
    while time.time() < since + 20:
        for checkpoint in folder.glob("runs/*/checkpoints/checkpoint-*"):
            with suppress(FileNotFoundError):
                if checkpoint.stat().st_mtime >= since and not (checkpoint / "sealed.json").exists():
                    return True
        if any(folder.glob("runs/*/trained")):
            return False
        time.sleep(0.002)
    return False


@pytest.mark.parametrize("whole", ["adamw_torch"], indirect=True)
def test_a_disk_that_is_full_at_a_checkpoint(whole: Path, again: Path, here: Here) -> None:
    """The run stops with a word on it, the last good checkpoint stands, and with room it ends in the same weights."""
    disk = again / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("NOT TESTED: a small disk takes root to mount")
    try:
        told = here("run", "recipe.yaml", cwd=again)
        assert told.code == 2, told
        assert "no space left on the disk" in told.err
        sealed = sorted(path.parent.name for path in disk.glob("*/checkpoints/*/sealed.json"))
        assert sealed
        assert f"checkpoint-{STEPS}" not in sealed
        subprocess.run(["mount", "-o", "remount,size=500M", disk], check=True)
        done = here("run", "recipe.yaml", cwd=again)
        assert done.code == 0, done.err
        assert "step 1/" not in done.out, "training began anew"
        assert_same_as(whole, again)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("damage", ["no seal", "a file is missing", "a file is cut short"])
def test_a_half_written_checkpoint_is_passed_over(whole: Path, again: Path, here: Here, damage: str) -> None:
    """Catches going on from a checkpoint that was being written when the process died."""
    run = only_run(shutil.copytree(whole / "runs", again / "runs"))
    shutil.rmtree(run / "trained")
    shutil.rmtree(run / "export")
    newest = run / "checkpoints" / "checkpoint-8"
    if damage == "no seal":
        (newest / "sealed.json").unlink()
    elif damage == "a file is missing":
        (newest / "optimizer.pt").unlink()
    else:
        weights = newest / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    done = here("run", "recipe.yaml", cwd=again)
    assert done.code == 0, done.err
    assert "checkpoint-8 is incomplete or damaged" in " ".join(done.err.split())
    assert "step 7/8" in done.out
    assert "step 6/8" not in done.out
    assert_same_as(whole, again)


@pytest.mark.parametrize("whole", ["adamw_torch"], indirect=True)
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(whole: Path, again: Path, here: Here) -> None:
    """Catches a stop that loses the steps since the last checkpoint, or that goes on differently."""
    run_until(again, 3, signal.SIGINT)
    done = here("run", "recipe.yaml", cwd=again)
    assert done.code == 0, done.err
    assert_same_as(whole, again)
