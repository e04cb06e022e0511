"""A run made again: the same bits, or the reason why not, before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs.made import make, trained
from whet.errors import WhetError
from whet.recipe import Recipe
from whet.runs import environment
from whet.runs.audit import audit
from whet.runs.ledger import events
from whet.runs.reproduce import reproduce, unlike
from whet.runs.store import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make(tmp_path)


def never(*_: object) -> Run:
    pytest.fail("it was started")


def set_fact(run: Run, tmp_path: Path, **values: Any) -> None:
    """Change run.json as its own writer would."""
    again = Run.open(run.recipe, tmp_path, run.folder.parent, data="da7a")
    for name, value in values.items():
        again.record(name, value)
    again.close()


def test_the_same_bits_are_the_same(run: Run) -> None:
    root = run.folder.parent
    result = reproduce(run.folder, root, trained)
    assert (result.same, result.same_data, result.tensors, result.first_step) == (True, True, {}, None)
    assert not list(root.glob(".reproduce-*"))
    *_, done = events(run.ledger.path)
    assert (done.what, done.run, done.facts["same"]) == ("reproduce.done", run.id, True)
    assert audit(root) == []


def test_only_what_leads_to_the_weights_is_done_again(tmp_path: Path) -> None:
    """Catches a second run that is logged to a server, or that a gate ends whose baseline lies in another folder."""
    changes = {"export.merged": "bf16", "track.tensorboard": True, "eval": {"exact_match": False}}
    run, seen = make(tmp_path, changes), []

    def watched(recipe: Recipe, base: Path, root: Path) -> Run:
        seen.append(recipe)
        return trained(recipe, base, root)

    assert reproduce(run.folder, run.folder.parent, watched).same
    assert run.recipe.track.tensorboard
    assert (seen[0].export.merged, seen[0].track.tensorboard, seen[0].eval.gate) == (None, False, None)
    assert seen[0].train == run.recipe.train


def test_one_bit_is_a_difference_and_is_shown(run: Run) -> None:
    """Catches a comparison with a tolerance; the second run is kept to be looked at."""

    def otherwise(recipe: Recipe, base: Path, root: Path) -> Run:
        again = trained(recipe, base, root)
        path = again.folder / "trained" / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors["lora_A"].view(torch.int32)[0, 0] ^= 1
        save_file(tensors, path)
        return again

    result = reproduce(run.folder, run.folder.parent, otherwise)
    assert not result.same
    assert set(result.tensors) == {"lora_A"}
    assert 0 < result.tensors["lora_A"] < 1e-6
    assert result.first_step is None
    assert result.folder is not None
    assert result.folder.is_dir()


def test_where_the_loss_parts_is_told(run: Run) -> None:
    """Catches a difference in the data that is told as one in the weights alone."""

    def otherwise(recipe: Recipe, base: Path, root: Path) -> Run:
        return trained(recipe.model_copy(update={"seed": 4}), base, root)

    result = reproduce(run.folder, run.folder.parent, otherwise)
    assert (result.same, result.first_step) == (False, 1)


def test_a_changed_input_is_named_and_nothing_starts(run: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    for anyway in (False, True):
        with pytest.raises(WhetError, match=r"input rows\.jsonl: [0-9a-f]{12} then, [0-9a-f]{12} now"):
            reproduce(run.folder, run.folder.parent, never, anyway=anyway)
    rows.unlink()
    with pytest.raises(WhetError, match=r"input rows\.jsonl: [0-9a-f]{12} then, nothing now"):
        reproduce(run.folder, run.folder.parent, never)


def test_another_version_is_named_and_nothing_starts(run: Run, tmp_path: Path) -> None:
    """Catches hours of training that could not have come out alike; what whet does not need is no reason."""
    lock = json.loads((run.folder / "run.json").read_text())["lock"]
    set_fact(run, tmp_path, lock=lock | {"pytest": "0.1", "torch": "1.0", "safetensors": "0.0"})
    with pytest.raises(WhetError, match=r"version torch: 1\.0 then, \d+") as error:
        reproduce(run.folder, run.folder.parent, never)
    assert "version safetensors: 0.0 then" in str(error.value)
    assert "version pytest" not in str(error.value)
    assert reproduce(run.folder, run.folder.parent, trained, anyway=True).same


def test_other_hardware_is_named(run: Run, tmp_path: Path) -> None:
    hardware = json.loads((run.folder / "run.json").read_text())["hardware"]
    set_fact(run, tmp_path, hardware=hardware | {"threads": 64, "gpus": ["H200"], "memory": 1}, code="0" * 64)
    assert [str(one) for one in unlike(run.folder)] == [
        f"code whet: {'0' * 12} then, {environment.code_digest()[:12]} now",
        f"hardware threads: 64 then, {torch.get_num_threads()} now",
        f"hardware gpus: H200 then, {'nothing' if not torch.cuda.device_count() else 'H200'} now",
    ]


def test_a_run_that_was_resumed_elsewhere_is_told(run: Run, tmp_path: Path) -> None:
    """Catches a run that two environments made, compared with what one would make."""
    hardware = json.loads((run.folder / "run.json").read_text())["hardware"]
    set_fact(run, tmp_path, hardware=hardware | {"threads": 64})
    shutil.rmtree(run.folder / "export")
    trained(run.recipe, tmp_path, run.folder.parent)
    (told,) = [event for event in events(run.ledger.path) if event.what == "run.resumed"]
    assert told.facts["unlike"] == [f"hardware threads: 64 then, {torch.get_num_threads()} now"]
    set_fact(run, tmp_path, hardware=hardware)
    with pytest.raises(WhetError, match="on resuming it, hardware threads: 64 then"):
        reproduce(run.folder, run.folder.parent, never)


def test_the_data_may_lie_elsewhere(run: Run, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "new" / "rows.jsonl")
    assert reproduce(run.folder, run.folder.parent, trained, base=tmp_path / "new").same
    with pytest.raises(WhetError, match="the folder of its data is gone"):
        reproduce(run.folder, run.folder.parent, never, base=tmp_path / "old")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: shutil.rmtree(f / "trained"), "no trained weights"),
        (lambda f: (f / "trained" / "adapter_model.safetensors").write_bytes(b"1"), "was changed after it was made"),
        (lambda f: (f / "receipts" / "trained.json").unlink(), "the receipt of its training is missing"),
        (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda f: (f / "recipe.yaml").write_text("name: a\n"), "this version of whet does not take it: model"),
        (lambda f: (f / "run.json").write_text("[]"), "it is damaged"),
    ],
)
def test_a_damaged_run_is_told_and_nothing_starts(run: Run, damage: Any, told: str) -> None:
    damage(run.folder)
    with pytest.raises(WhetError, match=told):
        reproduce(run.folder, run.folder.parent, never)


def test_a_reproduction_that_fails_leaves_nothing_but_its_event(run: Run) -> None:
    def fails(*_: object) -> Run:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reproduce(run.folder, run.folder.parent, fails)
    assert not list(run.folder.parent.glob(".reproduce-*"))
    *_, last = events(run.ledger.path)
    assert last.what == "reproduce.failed"
