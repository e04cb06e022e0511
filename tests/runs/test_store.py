"""A run's folder: its name, what is recorded, and what a crash leaves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.road import write_recipe, write_rows
from whet.errors import WhetError
from whet.recipe import load
from whet.runs.environment import PACKAGES, needed
from whet.runs.plots import plot_loss
from whet.runs.store import Run, input_digests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path)
    return tmp_path


def open_run(folder: Path) -> Run:
    return Run.open(load(folder / "recipe.yaml"), folder, folder / "runs")


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    run = open_run(folder)
    yield run
    run.close()


def test_the_same_inputs_lead_to_the_same_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a name that rests on the place or the time: the run would begin anew after a move."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_rows(elsewhere / "rows.jsonl")
    write_recipe(elsewhere)
    names = []
    for place in (folder, folder, elsewhere):
        run = open_run(place)
        names.append(run.folder.name)
        run.close()
    assert len(set(names)) == 1
    assert names[0].startswith("colours-")


def test_what_is_recorded(run: Run, folder: Path) -> None:
    facts = json.loads((run.folder / "run.json").read_text())
    assert set(facts["inputs"]) == {"rows.jsonl"}
    assert facts["seed"] == 3407
    assert set(facts["versions"]) == {"python", *PACKAGES}
    assert facts["hardware"]["cpus"] >= 1
    assert facts["git"] is None
    assert facts["seeds"]["training"] == 3407
    assert facts["base"] == str(folder)
    assert len(facts["code"]) == 64
    lock = facts["lock"]
    assert {"torch", "pytest", "pyyaml"} <= lock.keys(), "all that is installed, by its canonical name"
    assert lock["torch"] == facts["versions"]["torch"]
    resolved = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert resolved["train"]["weight_decay"] == 0.0


def test_the_git_state_is_recorded(folder: Path) -> None:
    """Catches a record that does not tell a changed recipe from a committed one."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "recipe.yaml"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    run = open_run(folder)
    run.close()
    state = json.loads((run.folder / "run.json").read_text())["git"]
    assert len(state["commit"]) == 40
    assert state["changed"] is True
    assert state["diff"] is not None


def test_a_second_process_is_refused_and_a_later_one_let_in(folder: Path) -> None:
    run = open_run(folder)
    with pytest.raises(WhetError, match="another process is at work"):
        open_run(folder)
    run.close()
    open_run(folder).close()


def test_a_local_model_is_an_input(folder: Path) -> None:
    """Catches a run that goes on with another model under the same name."""
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"1")
    recipe = load(write_recipe(folder, {"model.base": str(folder / "model")}))
    one = input_digests(recipe, folder)
    (folder / "model" / "model.safetensors").write_bytes(b"22")
    assert input_digests(recipe, folder) != one
    assert set(one) == {"rows.jsonl", str(folder / "model")}


def test_metrics_by_stage(run: Run) -> None:
    run.log(stage="train", step=1, loss=2.0)
    run.log(stage="eval", base={"loss": 1.0})
    assert [line["step"] for line in run.metrics("train")] == [1]
    assert len(run.metrics()) == 2


def test_a_torn_last_line_is_dropped(folder: Path) -> None:
    """Catches a crash in the midst of a line: a later line would be glued to it, and neither could be read. This one
    ends like a whole line."""
    run = open_run(folder)
    run.log(stage="train", step=1)
    run.close()
    path = run.folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": "eval", "base": {"loss": 1.0}')
    run = open_run(folder)
    run.log(stage="train", step=2)
    assert [line["step"] for line in run.metrics()] == [1, 2]
    run.close()


def test_forget_after(run: Run) -> None:
    """Catches steps that stand twice after a resumption, and another stage's lines that are lost."""
    for step in (1, 2, 3):
        run.log(stage="train", step=step)
    run.log(stage="eval", base={})
    run.forget_after(1)
    assert [(line["stage"], line.get("step")) for line in run.metrics()] == [("train", 1), ("eval", None)]


def test_a_stage_is_built_once(run: Run) -> None:
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "a").write_text("1")

    assert run.stage("data", build) == (run.folder / "data", True)
    assert run.stage("data", build) == (run.folder / "data", False)
    assert len(calls) == 1


def test_a_stage_that_fails_is_not_there(run: Run) -> None:
    def build(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.stage("data", build)
    assert not (run.folder / "data").exists()
    assert not list(run.folder.glob(".*partial"))


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_plot_loss(tmp_path: Path, steps: int) -> None:
    lines: list[dict[str, Any]] = [{"step": i + 1, "loss": 1 / (i + 1)} for i in range(steps)]
    plot_loss(lines, tmp_path / "loss.png", title="a_b $x$ [c]")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_whet_needs_decides_a_reproduction() -> None:
    """Catches a reproduction refused for the sake of a test runner, and one that a package of a package spoils."""
    found = needed()
    assert {"torch", "transformers", "safetensors", "numpy", "markupsafe"} <= found
    assert not {"pytest", "ruff", "matplotlib", "hypothesis"} & found


def test_damaged_facts_are_told(run: Run) -> None:
    """Catches a traceback where a run that was cut short is gone on with."""
    (run.folder / "run.json").write_text("{")
    with pytest.raises(WhetError, match="it is damaged"):
        run.record("memory", {})
