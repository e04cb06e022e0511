"""`whet runs ...`: what is printed, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.runs.made import copies, make, trained
from whet import cli_runs
from whet.recipe import load
from whet.runs.ledger import NAME, Ledger
from whet.runs.signing import VARIABLE
from whet.runs.store import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("made")
    return [make(folder, {"seed": seed}) for seed in (1, 2)]


@pytest.fixture
def runs(made: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_runs.console, "width", 200)
    return copies(made, tmp_path)


def whet_runs(*arguments: str) -> Result:
    return CliRunner().invoke(cli_runs.runs, [*arguments], catch_exceptions=False)


def test_list_and_show(runs: list[Run]) -> None:
    said = whet_runs("list")
    assert said.exit_code == 0
    assert all(run.id in said.output for run in runs)
    assert [run["state"] for run in json.loads(whet_runs("list", "--json").output)] == ["finished", "finished"]
    shown = whet_runs("show", runs[0].id).output
    assert "data, trained, eval, export" in shown
    assert "eval.tuned.loss" in shown
    assert json.loads(whet_runs("show", runs[0].id, "--json").output)["facts"]["seed"] == 1


def test_diff_exits_as_diff_does(runs: list[Run]) -> None:
    said = whet_runs("diff", runs[0].id, runs[1].id)
    assert said.exit_code == 1
    assert "seed" in said.output
    assert "versions" not in said.output, "a part without a difference is not shown"
    assert whet_runs("diff", runs[0].id, runs[0].id).exit_code == 0
    parts = json.loads(whet_runs("diff", runs[0].id, runs[1].id, "--json").output)
    assert parts["recipe"] == {"seed": [1, 2]}


def test_prune_does_nothing_unless_told(runs: list[Run]) -> None:
    """Catches a dry run that is none."""
    said = whet_runs("prune", runs[0].id, "--checkpoints")
    assert "nothing was removed: give --yes" in said.output
    assert runs[0].folder.exists()
    assert (runs[1].folder / "checkpoints").exists()
    assert "removed" in whet_runs("prune", runs[0].id, "--checkpoints", "--yes").output
    assert not runs[0].folder.exists()
    assert not (runs[1].folder / "checkpoints").exists()
    assert whet_runs("verify").exit_code == 0


def test_verify_exits_with_1_at_a_fault(runs: list[Run]) -> None:
    said = whet_runs("verify")
    assert said.exit_code == 0
    assert "whole 18 events" in said.output
    noted = said.output.split("--since ")[1].split()[0]
    assert whet_runs("verify", "--since", noted).exit_code == 0
    (runs[0].folder / "trained" / "adapter_model.safetensors").write_bytes(b"1")
    assert whet_runs("verify", "--ledger-only").exit_code == 0
    said = whet_runs("verify")
    assert said.exit_code == 1
    assert "adapter_model.safetensors: was changed after it was made" in said.output


def test_a_key_signs_what_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a signed ledger that reads as checked when no key was given, and an unsigned one that passes for one."""
    monkeypatch.chdir(tmp_path)
    assert f"export {VARIABLE}={tmp_path / 'my.key'}" in whet_runs("key", "my.key").output.replace("\n", "")
    (tmp_path / "runs").mkdir()
    Ledger(tmp_path / "runs" / NAME).append("a.done", run="")
    said = whet_runs("verify", "--key", "my.key.pub")
    assert said.exit_code == 1
    assert "is not signed" in said.output
    (tmp_path / "again").mkdir()
    monkeypatch.setenv(VARIABLE, "my.key")
    make(tmp_path / "again")
    said = whet_runs("verify", "--runs", "again/runs")
    assert "no signature was checked" in said.output
    said = whet_runs("verify", "--runs", "again/runs", "--key", "my.key.pub", "--every-signature")
    assert said.exit_code == 0
    assert "signed with the key given" in said.output


def test_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a difference that exits with 0."""
    run = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("whet.pipeline.run_recipe", lambda recipe, base, root, console: trained(recipe, base, root))
    said = whet_runs("reproduce", run.id)
    assert said.exit_code == 0
    assert "the same" in said.output

    def otherwise(recipe: object, base: Path, root: Path, console: object) -> Run:
        return trained(load(tmp_path / "recipe.yaml").model_copy(update={"seed": 9}), base, root)

    monkeypatch.setattr("whet.pipeline.run_recipe", otherwise)
    said = whet_runs("reproduce", run.id)
    assert said.exit_code == 1
    assert "the loss differs from step 1 on" in said.output
    assert "lora_A by up to" in said.output


def test_a_reproduction_that_is_stopped_exits_with_130(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C told as a success, and a half run that is left behind."""

    def stopped(*_: object) -> Run:
        raise KeyboardInterrupt

    monkeypatch.setattr("whet.pipeline.run_recipe", stopped)
    place = str(Path.cwd())
    said = whet_runs("reproduce", runs[0].id, "--base", place)
    assert said.exit_code == 130
    assert not list(Path("runs").glob(".reproduce-*"))


def test_the_verbs() -> None:
    """Catches a verb that scripts call and that is gone or renamed."""
    names = {command.name or command.callback.__name__ for command in cli_runs.runs.registered_commands}  # type: ignore[union-attr]
    assert names >= {"list", "show", "diff", "reproduce", "prune", "verify", "key"}
