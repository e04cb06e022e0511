"""What runs there are and how two differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs.made import copies, make
from whet.errors import WhetError
from whet.runs.browse import diff, flat, list_runs, measures, summary
from whet.runs.folders import find, metrics
from whet.runs.store import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    return copies([made], tmp_path)[0]


def test_a_run_at_a_glance(run: Run, tmp_path: Path) -> None:
    """Catches the prepared data, or what a reproduction left, listed as a run."""
    root = run.folder.parent
    for name in ("data/colours", ".reproduce-x/colours-1"):
        (root / name).mkdir(parents=True)
        (root / name / "run.json").write_text("{}")
    (seen,) = list_runs(root)
    assert (seen.id, seen.name, seen.state, seen.steps) == (run.id, "colours", "finished", 3)
    assert seen.stages == ("data", "trained", "eval", "export")
    assert seen.scores == {"eval.base.loss": 2.0, "eval.tuned.loss": 1.5}
    assert seen.loss == run.metrics("train")[-1]["loss"]
    assert seen.size > 1000


def test_how_far_a_run_came(run: Run, tmp_path: Path) -> None:
    shutil.rmtree(run.folder / "export")
    assert summary(run.folder).state == "stopped"
    busy = Run.open(run.recipe, tmp_path, run.folder.parent, data="da7a")
    assert summary(run.folder).state == "at work"
    busy.close()


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "metrics.jsonl", "receipts/eval.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b"\xff\xfe\n", b"nonsense: [\n"])
def test_a_damaged_run_is_listed_as_one(run: Run, name: str, content: bytes) -> None:
    """Catches one damaged file that hides all other runs."""
    (run.folder / name).write_bytes(content)
    (seen,) = list_runs(run.folder.parent)
    cut_short = name == "metrics.jsonl" and not content.endswith(b"\n")
    assert (seen.state, seen.fault is None) == (("finished", True) if cut_short else ("damaged", False))
    if not cut_short and "receipts" not in name:
        with pytest.raises(WhetError):
            diff(run.folder, run.folder)


def test_how_a_run_may_be_called(run: Run, tmp_path: Path) -> None:
    root, other = run.folder.parent, make(tmp_path, {"seed": 5})
    for name in (run.id, run.id[:-2], str(run.folder)):
        assert find(root, name).name == run.id
    with pytest.raises(WhetError, match="several runs begin with 'colours'") as error:
        find(root, "colours")
    assert run.id in str(error.value)
    assert other.id in str(error.value)
    with pytest.raises(WhetError, match="no run is called"):
        find(root, "colors")
    with pytest.raises(WhetError, match="there is no such folder"):
        find(tmp_path / "nowhere", "colours")


def test_how_two_runs_differ(run: Run, tmp_path: Path) -> None:
    """Catches a comparison by lines, and one that leaves out what no recipe says: rows, versions, machine."""
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + "\n")
    other = make(tmp_path, {"train.learning_rate": 0.002, "seed": 5})
    facts = json.loads((other.folder / "run.json").read_text())
    facts["lock"] = {name: version for name, version in facts["lock"].items() if name != "trl"} | {"torch": "9"}
    facts["hardware"]["gpus"] = ["H200"]
    (other.folder / "run.json").write_text(json.dumps(facts))
    found = diff(run.folder, other.folder).parts
    assert found["recipe"] == {"train.learning_rate": (0.001, 0.002), "seed": (3407, 5)}
    assert set(found["inputs"]) == {"rows.jsonl"}
    assert set(found["versions"]) == {"torch", "trl"}
    assert found["versions"]["trl"][1] is None
    assert found["hardware"] == {"gpus": ([], None), "gpus[0]": (None, "H200")}
    assert set(found["metrics"]) == {"train.first_loss", "train.last_loss"}
    assert not diff(run.folder, run.folder)


def test_measures_are_the_last_of_each_task() -> None:
    """Catches the score of an early checkpoint shown as the run's."""
    lines = [
        {"stage": "train", "step": 1, "loss": 3.0},
        {"stage": "eval", "step": 1, "task": "qa", "mean": 0.2, "seconds": 1.0},
        {"stage": "train", "step": 2, "loss": 2.0},
        {"stage": "eval", "step": 2, "task": "qa", "mean": 0.4, "seconds": 1.0},
        {"stage": "watch", "step": 2, "loss": 9.0},
    ]
    found = measures(lines)
    assert found["eval.qa.mean"] == 0.4
    assert (found["train.steps"], found["train.first_loss"], found["train.last_loss"]) == (2, 3.0, 2.0)
    assert measures([]) == {}


def test_a_line_that_is_none_is_named(run: Run) -> None:
    path = run.folder / "metrics.jsonl"
    path.write_text('{"a": 1}\nno\n{"b": 2}\n{"c"')
    with pytest.raises(WhetError, match=r"metrics\.jsonl:2"):
        metrics(run.folder)
    path.write_text('{"a": 1}\n{"c"')
    assert metrics(run.folder) == [{"a": 1}]


NAMES = st.text(st.characters(categories=["L"]), min_size=1, max_size=3)
NESTED = st.recursive(
    st.integers() | st.just({}) | st.just([]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
)


@given(st.dictionaries(NAMES, NESTED, max_size=3), st.dictionaries(NAMES, NESTED, max_size=3))
def test_two_values_are_flat_alike_only_if_they_are_alike(one: object, other: object) -> None:
    """Catches a difference that is lost because two places get one name, or an empty list none."""
    assert (flat(one) == flat(other)) == (one == other)
