"""A run that was killed, or stopped by Ctrl-C, goes on to the very weights it would have had."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.resuming import STEPS, again, assert_same_as, whole  # noqa: F401
from tests.road import Here, metrics, only_run
from tests.warm import Warm, whet


def run_until(folder: Path, step: int, end: int) -> None:
    """Start the run and send it the signal `end` once `step` steps are in its metrics."""
    process = Warm(whet, "run", "recipe.yaml", cwd=folder)
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
        assert process.poll() == -signal.SIGKILL
    else:
        assert process.poll() == 130
        assert "to go on: whet run recipe.yaml" in err
        stopped = metrics(run)[-1]["step"]
        assert f"stopped after step {stopped}" in err
        assert (run / "checkpoints" / f"checkpoint-{stopped}" / "sealed.json").exists()


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


@pytest.mark.parametrize("whole", ["adamw_torch"], indirect=True)
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
