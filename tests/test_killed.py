"""A run that is killed again and again, or whose disk is full, ends in the very weights it would have had."""

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

from tests.forked import Forked
from tests.resuming import STEPS, again, assert_same_as, whole  # noqa: F401
from tests.road import Here, only_run

KILLS = 20
SEED = time.time_ns()  # of the moments to kill at: other ones each time


@pytest.mark.parametrize("whole", ["adamw_8bit"], indirect=True)
def test_killed_twenty_times_at_random(whole: Path, again: Path) -> None:
    """Catches a moment that leaves something half written: fifteen kills at any time, five in a checkpoint."""
    chance = random.Random(SEED)
    forked = Forked(again)
    writing = 0
    try:
        for kill in range(KILLS):
            process = forked.start()
            if kill % 4 == 3 and is_writing(again, since=time.time()):
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
    assert writing >= 3
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
