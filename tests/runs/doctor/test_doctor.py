"""Sixteen runs in which one thing is wrong, and three in which nothing is: the doctor names the cause, or nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.road import write_rows
from tests.runs.doctor.planted import (
    ROWS,
    STEPS,
    damage,
    freeze,
    overflow_at,
    plant,
    rewritten,
    row,
    without_labels,
)
from tests.runs.folders import write_run
from whet.cli_doctor import doctor_run
from whet.errors import WhetError
from whet.models.load import load_tokenizer
from whet.runs.doctor import Finding, examine, to_json
from whet.runs.doctor.findings import CAUSES, in_order
from whet.runs.doctor.series import SPIKE_LEAST, is_spike


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder in which all went well."""
    planted = plant(tmp_path_factory.mktemp("healthy"))
    planted.train()
    planted.run.close()
    return planted.folder


def numbers(seed: int) -> str:
    """Eighty numbers: more tokens than a row has, and no two texts alike."""
    return " ".join(str(n) for n in random.Random(seed).sample(range(10_000), 80))


def primary(folder: Path) -> Finding:
    """The one finding that is said to explain the others."""
    findings = examine(folder)
    assert [finding.primary for finding in findings].count(True) == 1, findings
    assert findings[0].primary
    return findings[0]


# ---------------------------------------------------------------- nothing is wrong


def test_a_healthy_run_gets_no_finding(healthy: Path) -> None:
    assert examine(healthy) == []


def test_a_healthy_run_without_packing_gets_no_finding(tmp_path: Path) -> None:
    planted = plant(tmp_path, changes={"train.packing": False, "seed": 7})
    planted.train(measure=True)
    assert examine(planted.folder) == []


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("steps", [9, 40, 400])
def test_the_noise_of_a_healthy_loss_is_no_finding(tmp_path: Path, seed: int, steps: int) -> None:
    """Catches thresholds that call noise a spike, a short run too slow, or a warm-up a divergence."""
    assert examine(write_run(tmp_path, seed=seed, steps=steps)) == []


# ---------------------------------------------------------------- real runs, planted failures


def test_nan_at_a_step_names_layer_and_row_and_training_goes_on(tmp_path: Path) -> None:
    (rare,) = load_tokenizer("builtin:tiny")(" zebra", add_special_tokens=False)["input_ids"][-1:]
    planted = plant(tmp_path, [*ROWS, row("Is this a zebra?", "yes")])
    planted.train(lambda model: overflow_at(model, rare, "layers.2.mlp.down_proj"))
    found = primary(planted.folder)
    assert found.cause == "bad batch"
    assert "model.layers.2.mlp.down_proj" in found.where
    assert "row " in found.where
    assert planted.lines("train")[-1]["step"] == STEPS


def test_a_damaged_weight_is_named_and_stops(tmp_path: Path) -> None:
    names: list[str] = []
    planted = plant(tmp_path)
    with pytest.raises(WhetError, match="the loss became nan at step 1"):
        planted.train(lambda model: names.append(damage(model)))
    found = primary(planted.folder)
    assert (found.cause, found.where) == ("damaged weights", names[0])


def test_a_rate_of_100_times_is_too_high(tmp_path: Path) -> None:
    planted = plant(tmp_path, changes={"train.learning_rate": 0.1})
    planted.train()
    assert primary(planted.folder).cause == "learning rate too high"


def test_a_rate_of_nearly_nothing_is_too_low(tmp_path: Path) -> None:
    planted = plant(tmp_path, changes={"train.learning_rate": 1e-8})
    planted.train()
    assert primary(planted.folder).cause == "learning rate too low"


def test_rows_without_labels(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    with pytest.raises(WhetError, match="no token of the last 10 steps' rows carries loss"):
        planted.train(change=without_labels)
    assert primary(planted.folder).cause == "nothing to learn from"


def test_a_frozen_adapter(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    with pytest.raises(WhetError, match="the adapter is frozen"):
        planted.train(freeze)
    assert primary(planted.folder).cause == "frozen adapter"


def test_overfitting(tmp_path: Path) -> None:
    changes = {"train.max_steps": 25, "train.learning_rate": 5e-3, "train.checkpoint_every": 5}
    planted = plant(tmp_path, ROWS[:16], changes)
    planted.train(measure=True)
    assert primary(planted.folder).cause == "overfitting"


def test_a_spike_names_the_rows_of_a_bad_batch(tmp_path: Path) -> None:
    odd = row("Say 77777", " ".join(["zebra quantum fjord xylophone"] * 3))
    changes = {"train.max_steps": 30, "train.learning_rate": 3e-3, "train.checkpoint_every": 30}
    planted = plant(tmp_path, [*(row(f"Say {i}", "red") for i in range(100)), odd], changes)
    planted.train()
    found = primary(planted.folder)
    assert found.cause == "loss spike"
    assert "of data/train" in found.where


def test_duplicated_data(tmp_path: Path) -> None:
    planted = plant(tmp_path, [*ROWS, *ROWS[:10] * 3], {"data.dedup": None})
    found = primary(planted.folder)
    assert found.cause == "duplicated data"
    assert "4 times" in found.what


def test_a_leaking_evaluation(tmp_path: Path) -> None:
    write_rows(tmp_path / "eval.jsonl", [*ROWS[:4], row("Which shape?", "round")])
    changes = {"data.split": None, "data.eval_sources": [{"path": "eval.jsonl"}], "data.leaks": None}
    found = primary(plant(tmp_path, changes=changes).folder)
    assert found.cause == "leaking evaluation"
    assert "4 of 5" in found.what


def test_a_template_that_is_not_the_bases(tmp_path: Path) -> None:
    found = primary(plant(tmp_path, changes={"model.template": "zephyr"}).folder)
    assert (found.cause, found.where) == ("wrong template", "model.template: zephyr")


def test_rows_of_a_file_that_was_cut_short(tmp_path: Path) -> None:
    found = primary(plant(tmp_path, changes={"data.bad_rows": 0.6}, broken_lines=20).folder)
    assert found.cause == "unreadable rows"
    assert "20 of 60" in found.what


def test_rows_whose_answers_are_cut(tmp_path: Path) -> None:
    long = [row(f"Count on from {i}.", numbers(i)) for i in range(20)]
    assert primary(plant(tmp_path, long).folder).cause == "cut rows"


def test_rows_whose_prompts_fill_the_length(tmp_path: Path) -> None:
    long = [row(numbers(i), "red") for i in range(30)]
    found = primary(plant(tmp_path, [*ROWS[:20], *long]).folder)
    assert found.cause == "nothing to learn from"


# ---------------------------------------------------------------- a healthy run's folder, changed


def test_a_damaged_checkpoint(healthy: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(healthy, tmp_path / "run")
    path = copy / "checkpoints" / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = primary(copy)
    assert (found.cause, found.where) == ("damaged checkpoint", f"checkpoints/checkpoint-{STEPS}")
    assert "adapter_model.safetensors" in found.what


Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def exploding(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line | ({"grad_norm": 5e4} if line["step"] > 9 else {}) for line in lines]


def underflow(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scales = [{"stage": "watch", "step": step, "loss_scale": 65536.0 / 4**step} for step in (2, 5, 8, 12)]
    return [line | {"grad_norm": float("nan")} for line in lines] + scales


def fragmented(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    held = {"reserved": 40 << 30, "allocated_peak": 24 << 30}
    return [*lines, {"stage": "watch", "step": 4, **held}]


def nan_after_climbing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    losses = [3, 2, 1.5, 1.2, 1.0, 1.1, 1.0, 1.3, 1.8, 2.9, 6.0]
    return [line | {"loss": loss} for line, loss in zip(lines, [*losses, float("nan")], strict=True)]


def nan_of_a_sudden(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line | ({"loss": float("nan")} if line["step"] == 11 else {}) for line in lines[:11]]


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (exploding, "exploding gradients"),
        (underflow, "fp16 range"),
        (fragmented, "memory fragmentation"),
        (nan_after_climbing, "learning rate too high"),
        (nan_of_a_sudden, "not a number"),
    ],
)
def test_numbers_that_take_long_to_come_about(healthy: Path, tmp_path: Path, change: Change, cause: str) -> None:
    copy = rewritten(healthy, tmp_path / "run", change)
    if cause == "fp16 range":
        path = copy / "recipe.yaml"
        path.write_text(path.read_text().replace("dtype: null", "dtype: float16"))
    assert primary(copy).cause == cause


def test_a_torn_file_is_a_finding_and_no_crash(healthy: Path, tmp_path: Path) -> None:
    """Catches a doctor that fails on the damage it is asked about."""
    for name in ("metrics.jsonl", "run.json", "data/manifest.json", "data/train-00000.arrow", "recipe.yaml"):
        copy = shutil.copytree(healthy, tmp_path / name.replace("/", "-"))
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(b"{\x00" + content[: len(content) // 2])
        assert {finding.cause for finding in examine(copy)} <= {"unreadable run", "unreadable rows"}
        assert examine(copy) or name == "recipe.yaml"


def test_a_folder_cut_anywhere_never_crashes_the_doctor(healthy: Path, tmp_path: Path) -> None:
    """Catches the file that a run which was killed has not written yet."""
    chance = random.Random(3)
    files = sorted(path.relative_to(healthy) for path in healthy.rglob("*") if path.is_file())
    copy = shutil.copytree(healthy, tmp_path / "run")
    for name in chance.sample(files, len(files)):
        (copy / name).unlink()
        examine(copy)


# ---------------------------------------------------------------- order and command line


def test_the_gravest_comes_first_and_one_at_most_is_primary() -> None:
    findings = [Finding("warning", cause, "", "", "") for cause in reversed(CAUSES)]
    worst = Finding("error", CAUSES[-1], "", "", "")
    ordered = in_order([*findings, worst])
    assert ordered[0].cause == worst.cause
    assert [f.primary for f in ordered] == [True] + [False] * len(findings)
    assert not in_order([Finding("note", "plateau", "", "", "")])[0].primary


def test_the_command_says_the_cause_and_exits_with_1(healthy: Path, tmp_path: Path) -> None:
    """Catches a schedule of runs that goes on after one that failed."""
    app = typer.Typer()
    app.command()(doctor_run)
    assert CliRunner().invoke(app, [str(healthy)]).exit_code == 0
    told = CliRunner().invoke(app, [str(rewritten(healthy, tmp_path / "run", exploding)), "--json"])
    assert told.exit_code == 1
    assert [finding["cause"] for finding in json.loads(told.stdout)] == ["exploding gradients"]


@given(
    st.lists(st.floats(0.1, 10), min_size=SPIKE_LEAST, max_size=40),
    st.floats(0.1, 100),
    st.sampled_from([0.25, 4.0, 1024.0]),
)
def test_a_spike_is_one_in_any_unit(before: list[float], value: float, unit: float) -> None:
    assert is_spike(value * unit, [v * unit for v in before]) == is_spike(value, before)


def test_findings_are_what_the_report_takes(healthy: Path, tmp_path: Path) -> None:
    (found,) = to_json(examine(rewritten(healthy, tmp_path / "run", exploding)))
    assert {"severity", "cause", "where", "what", "advice", "step"} <= found.keys()
    assert json.loads(json.dumps(found)) == found
