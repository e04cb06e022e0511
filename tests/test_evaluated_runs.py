"""A recipe's tasks at checkpoints and at the end, the gate that lets a model out or not, and who is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.road import QUESTION, Here, metrics, only_run, write_recipe, write_rows
from whet.errors import WhetError
from whet.pipeline import Refused, run_recipe
from whet.recipe import load
from whet.recipe_evals import AtCheckpoints
from whet.runs.audit import audit
from whet.runs.store import Run

COLOUR = (
    "name: colour\ndata: q.jsonl\nscorer: {kind: regex, pattern: red|green|blue}\ngeneration: {max_new_tokens: 4}\n"
)
LEARNS = {"train.max_steps": 24, "train.epochs": 24, "train.learning_rate": 5.0e-3, "adapter.dropout": 0.0}
EVAL: dict[str, Any] = {"max_new_tokens": 3, "limit": 2, "exact_match": True, "tasks": ["evals/*.yaml"]}


def write(folder: Path, **settings: Any) -> Path:
    """A recipe that learns colours, and a task that asks for any colour."""
    write_rows(folder / "rows.jsonl")
    (folder / "evals").mkdir()
    asked = [{"prompt": QUESTION.format(i)} for i in range(24)]
    write_rows(folder / "evals" / "q.jsonl", asked)
    (folder / "evals" / "colour.yaml").write_text(COLOUR)
    (folder / "general.txt").write_text(
        "All happy families are alike; each unhappy family is unhappy in its own way. " * 40
    )
    return write_recipe(folder, {**LEARNS, "data.leaks": None, "eval": {**EVAL, **settings}})


def run(folder: Path, **options: Any) -> Run:
    recipe = load(folder / "recipe.yaml")
    return run_recipe(recipe, folder, folder / "runs", Console(quiet=True), **options)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "ledger.jsonl").read_text().splitlines()]


def test_a_model_that_gained_is_exported_and_all_is_told(tmp_path: Path, here: Here) -> None:
    """Catches a gate that never lets out, the base's scores taken for the tuned model's, evals that end training."""
    gate = {"task": "colour", "min_gain": 0.2, "max_perplexity_increase": 50.0}
    write(tmp_path, every="checkpoint", samples=2, general_text="general.txt", gate=gate)
    done = run(tmp_path)
    assert (done.folder / "export").is_dir()
    decision = json.loads((done.folder / "eval" / "gate.json").read_text())
    assert decision["ship"] is True
    assert [check["passed"] for check in decision["checks"]] == [True, True]

    steps = {line["step"]: line for line in metrics(done.folder) if line["stage"] == "eval" and "step" in line}
    assert sorted(steps) == [0, 24]
    assert steps[24]["mean"] > steps[0]["mean"] + 0.2
    for step in (0, 24):
        lines = [json.loads(line) for line in (done.folder / "samples" / f"{step}.jsonl").read_text().splitlines()]
        assert len(lines) == 2
        assert {line["step"] for line in lines} == {step}

    told = {event["what"]: event for event in events(tmp_path)}
    assert told["gate.decided"]["facts"] == {"ship": True, "failed": [], "baseline": "base"}
    assert {"data.done", "trained.done", "eval.done", "export.done"} <= told.keys()
    assert audit(tmp_path / "runs") == []
    report = (done.folder / "report.html").read_text()
    assert "colour" in report
    assert "http://" not in report.replace("http://www.w3.org", "")

    command = ("eval", "evals/colour.yaml", "--run", done.id, "--compare", "base", "--gate")
    assert here(*command, cwd=tmp_path).code == 0
    (tmp_path / "hard.yaml").write_text("task: colour\nmin_gain: 0.99\n")
    assert here(*command, "--rules", "hard.yaml", cwd=tmp_path).code == 1
    assert events(tmp_path)[-1]["facts"]["ship"] is False


@pytest.mark.parametrize(
    ("gate", "failed"),
    [
        ({"task": "colour", "min_gain": 0.99}, "gain on colour over base"),
        ({"task": "colour", "baseline": "gone"}, "gain on colour over gone"),
        ({"task": "other"}, "gain on other over base"),
    ],
)
def test_a_model_that_may_not_ship_is_not_exported(
    tmp_path: Path, here: Here, gate: dict[str, Any], failed: str
) -> None:
    """Too small a gain, a baseline that is not there, a task that nobody ran: a no, each time it runs."""
    write(tmp_path, gate=gate)
    with pytest.raises(Refused, match="do not ship"):
        run(tmp_path)
    folder = only_run(tmp_path / "runs")
    assert not (folder / "export").exists()
    assert failed in events(tmp_path)[-1]["facts"]["failed"]
    told = here("run", "recipe.yaml", cwd=tmp_path)
    assert told.code == 1
    assert "not exported: do not ship" in told.err
    assert "Traceback" not in told.err
    assert not (folder / "export").exists()
    assert "refused" in here("runs", "list", cwd=tmp_path).out


def test_a_broken_task_is_found_before_anything_is_trained(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "evals" / "colour.yaml").write_text("name: colour\ndata: q.jsonl\nscorer: guess\n")
    with pytest.raises(WhetError, match=r"colour\.yaml:3"):
        run(tmp_path)
    assert not (tmp_path / "runs").exists()


def test_asking_at_checkpoints_changes_nothing_that_is_trained(tmp_path: Path) -> None:
    """Catches an evaluation that moves a random generator or leaves the model in another mode: dropout shows it."""
    adapters = []
    for name, settings in (("asked", {"every": "checkpoint", "samples": 2}), ("left", {})):
        (tmp_path / name).mkdir()
        write(tmp_path / name, **settings)
        write_recipe(
            tmp_path / name,
            {"data.leaks": None, "train.max_steps": 4, "train.checkpoint_every": 1, "eval": {**EVAL, **settings}},
        )
        adapters.append((run(tmp_path / name).folder / "trained" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_a_checkpoint_is_asked_its_tasks_after_a_kill_between_its_loss_and_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that goes on and takes a held-out loss for all that was to be measured, or stumbles over it."""
    asking = {"every": "checkpoint", "samples": 1}
    write(tmp_path, **asking)
    stop = {"patience": 3, "min_gain": 0.0}
    write_recipe(
        tmp_path,
        {
            "data.leaks": None,
            "train.max_steps": 4,
            "train.checkpoint_every": 2,
            "train.early_stop": stop,
            "eval": {**EVAL, **asking},
        },
    )
    with monkeypatch.context() as killed:
        killed.setattr(AtCheckpoints, "on_save", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    folder = only_run(tmp_path / "runs")
    assert [line["step"] for line in metrics(folder) if line["stage"] == "eval" and line["step"]] == [2], "the loss"
    done = run(tmp_path)
    lines = [line for line in metrics(done.folder) if line["stage"] == "eval" and "step" in line]
    assert [line["step"] for line in lines if line.get("task") == "colour"] == [0, 2, 4]
    assert (folder / "samples" / "2.jsonl").exists()


def _killed(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_a_smoke_run_comes_first_and_leaves_the_real_one_alone(tmp_path: Path) -> None:
    """Catches a smoke run whose weights or random state go into the training after it."""
    adapters = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl")
        write_recipe(tmp_path / name)
        done = run(tmp_path / name, smoke=name == "with")
        adapters.append((done.folder / "trained" / "adapter_model.safetensors").read_bytes())
        assert (done.folder / "smoke" / "summary.json").exists() is (name == "with")
    assert adapters[0] == adapters[1]
