"""What may be removed, what must stay, and what is told of it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from tests.runs.made import copies, make
from whet.errors import WhetError
from whet.runs.audit import audit
from whet.runs.ledger import Ledger, events, head_path
from whet.runs.prune import REMOVED, Item, Rules, plan, remove
from whet.runs.store import Run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs of one name."""
    folder = tmp_path_factory.mktemp("two")
    return [make(folder, {"seed": seed}) for seed in (1, 2)]


@pytest.fixture
def runs(two: list[Run], tmp_path: Path) -> list[Run]:
    """The first 30 days old, the second 20."""
    made = copies(two, tmp_path)
    for run, days in zip(made, (30, 20), strict=True):
        age(run.folder, days)
    return made


def age(folder: Path, days: float) -> None:
    then = time.time() - days * 86_400
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then))


def planned(runs: list[Run], rules: Rules) -> tuple[set[Path], dict[Path, str]]:
    items = plan(runs[0].folder.parent, rules)
    return {i.folder for i in items if i.kept is None}, {i.folder: i.kept for i in items if i.kept is not None}


def reference(run: Run, baseline: str) -> None:
    """Make `baseline` what the run's gate compares with."""
    recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    recipe["eval"] = {"gate": {"baseline": baseline}}
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("rules", "removed"),
    [
        (Rules(older_than=10), [0]),
        (Rules(older_than=10, keep=0), [0, 1]),
        (Rules(older_than=25, keep=0), [0]),
        (Rules(older_than=40, keep=0), []),
        (Rules(older_than=10, keep=2), []),
    ],
)
def test_which_runs_are_old(runs: list[Run], rules: Rules, removed: list[int]) -> None:
    assert planned(runs, rules) == ({runs[i].folder for i in removed}, {})


def test_a_run_that_stopped_on_the_way_is_old_only_when_asked_for(runs: list[Run]) -> None:
    """Catches days of training that could have gone on, removed as an old run."""
    shutil.rmtree(runs[0].folder / "export")
    age(runs[0].folder, 30)
    assert planned(runs, Rules(older_than=10)) == (set(), {})
    assert planned(runs, Rules(older_than=10, unfinished=True)) == ({runs[0].folder}, {})


def test_checkpoints_of_finished_runs_alone(runs: list[Run]) -> None:
    """Catches checkpoints removed that a run would go on from."""
    shutil.rmtree(runs[1].folder / "export")
    removed, kept = planned(runs, Rules(checkpoints=True))
    assert removed == {runs[0].folder / "checkpoints"}
    assert "not finished" in kept[runs[1].folder / "checkpoints"]


@pytest.mark.parametrize("how", ["{id}", "{short}", "runs/{id}", "/elsewhere/runs/{id}/eval", "ledger"])
def test_a_baseline_of_another_run_stays(runs: list[Run], how: str) -> None:
    """Catches a gate that has nothing to compare with any more, however the baseline was called."""
    old, new = runs
    if how == "ledger":
        new.ledger.append("gate.decided", run=new.id, facts={"baseline": old.id})
    else:
        reference(new, how.format(id=old.id, short=old.id[:-3]))
    for rules in (Rules(older_than=10), Rules(runs=(old.id,))):
        assert planned(runs, rules) == (set(), {old.folder: f"{new.id} has it as its baseline"})
    remove(old.folder.parent, plan(old.folder.parent, Rules(runs=(old.id,))), old.ledger)
    assert old.folder.exists()


def test_what_a_run_says_of_itself_holds_nothing(runs: list[Run]) -> None:
    reference(runs[0], runs[0].id)
    age(runs[0].folder, 30)
    assert planned(runs, Rules(older_than=10)) == ({runs[0].folder}, {})


def test_when_baselines_are_not_known_nothing_is_removed(runs: list[Run]) -> None:
    """Catches a recipe that cannot be read taken for one without a baseline."""
    (runs[1].folder / "recipe.yaml").write_text("eval: [")
    with pytest.raises(WhetError, match="damaged"):
        plan(runs[0].folder.parent, Rules(older_than=10))


def test_a_run_at_work_stays(runs: list[Run], tmp_path: Path) -> None:
    busy = Run.open(runs[0].recipe, tmp_path, tmp_path / "runs", data="da7a")
    items = plan(tmp_path / "runs", Rules(runs=(busy.id,)))
    assert [item.kept for item in items] == ["a process is at work on it"]
    sneaky = [Item(busy.folder, 0, "named")]
    assert remove(tmp_path / "runs", sneaky, busy.ledger) == 0, "it began work between plan and removal"
    assert busy.folder.exists()
    busy.close()


@pytest.mark.parametrize("name", ["nothing", "../elsewhere"])
def test_a_run_that_is_not_there_or_lies_elsewhere_is_refused(runs: list[Run], tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    elsewhere = make(tmp_path / "other")
    name = str(elsewhere.folder) if "elsewhere" in name else name
    with pytest.raises(WhetError, match=r"lies elsewhere|no run is called"):
        plan(tmp_path / "runs", Rules(runs=(name,)))


def test_without_a_rule_nothing_is_planned(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(WhetError, match="nothing says what to remove"):
        plan(tmp_path / "runs", Rules())


def test_a_removal_is_told_and_leaves_no_fault(runs: list[Run], tmp_path: Path) -> None:
    """Catches a run that is gone without a word, and a ledger that calls its own removals faults."""
    root = tmp_path / "runs"
    (root / f"{REMOVED}old").mkdir()
    items = plan(root, Rules(runs=(runs[0].id,), checkpoints=True))
    freed = remove(root, items, runs[0].ledger)
    assert freed == sum(item.size for item in items) > 2000
    assert not runs[0].folder.exists()
    assert not (runs[1].folder / "checkpoints").exists()
    assert not list(root.glob(f"{REMOVED}*"))
    told = {(event.what, event.run) for event in events(root / "ledger.jsonl")}
    assert {("run.pruned", runs[0].id), ("checkpoints.pruned", runs[1].id)} <= told
    assert audit(root) == []
    make(tmp_path, {"seed": 1})
    assert audit(root) == [], "a run may be made again after it was removed"


def test_a_removal_that_cannot_be_told_does_not_happen(runs: list[Run], tmp_path: Path) -> None:
    head_path(runs[0].ledger.path).unlink()
    items = plan(tmp_path / "runs", Rules(runs=(runs[0].id,)))
    with pytest.raises(WhetError):
        remove(tmp_path / "runs", items, Ledger(runs[0].ledger.path))
    assert runs[0].folder.exists()


def test_a_run_that_someone_removed_can_be_told_of(runs: list[Run], tmp_path: Path) -> None:
    """Catches a fault that nothing can ever mend."""
    root = tmp_path / "runs"
    shutil.rmtree(runs[0].folder)
    (fault,) = audit(root)
    assert f"whet runs prune {runs[0].id} --yes" in fault.what
    assert remove(root, plan(root, Rules(runs=(runs[0].id,))), runs[0].ledger) == 0
    assert audit(root) == []
    with pytest.raises(WhetError, match="no run is called"):
        plan(root, Rules(runs=(runs[0].id,)))
