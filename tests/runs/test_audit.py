"""Whether the runs are what the ledger says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs.made import copies, make
from whet.errors import WhetError
from whet.files import sha256
from whet.runs.audit import audit
from whet.runs.ledger import NAME, events, head_path
from whet.runs.store import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    return copies([made], tmp_path)[0]


def told(run: Run) -> str:
    return "\n".join(f"{fault.where}: {fault.what}" for fault in audit(run.folder.parent))


def test_a_run_as_it_was_made_has_no_faults(run: Run) -> None:
    assert told(run) == ""
    assert [event.what for event in events(run.ledger.path)] == [
        "run.opened",
        *(f"{stage}.{end}" for stage in ("data", "trained", "eval", "export") for end in ("started", "done")),
    ]


def test_a_stage_says_what_it_was_made_from(run: Run) -> None:
    """Catches a chain of custody with a gap: an adapter that no event ties to its data."""
    by_name = {event.what: event for event in events(run.ledger.path)}
    assert by_name["trained.done"].inputs == {"run": by_name["run.opened"].hash, "data": by_name["data.done"].hash}
    assert set(by_name["run.opened"].inputs) == {"rows.jsonl", "data"}
    assert set(by_name["trained.done"].outputs) == {"adapter_model.safetensors"}


def edit(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes() + b" ")


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def forge_receipt(folder: Path) -> None:
    """Another adapter, with a receipt that fits it."""
    (folder / "trained" / "adapter_model.safetensors").write_bytes(b"other")
    path = folder / "receipts" / "trained.json"
    receipt = json.loads(path.read_text())
    receipt["files"]["adapter_model.safetensors"] = "0" * 64
    path.write_text(json.dumps(receipt))


def edit_metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2, "loss"', '"step": 2, "Loss"'))


@pytest.mark.parametrize(
    ("tamper", "fault"),
    [
        (edit("trained/adapter_model.safetensors"), "adapter_model.safetensors: was changed after it was made"),
        (remove("trained/adapter_model.safetensors"), "adapter_model.safetensors: is missing"),
        (remove("trained"), "trained: is missing"),
        (lambda folder: (folder / "trained" / "x.bin").write_bytes(b"1"), "x.bin: was added"),
        (edit("recipe.yaml"), "recipe.yaml: was changed"),
        (edit("run.json"), "run.json: was changed"),
        (edit_metrics, "metrics.jsonl: lines that export left were changed"),
        (remove("metrics.jsonl"), "metrics.jsonl: lines that export left"),
        (remove("receipts/trained.json"), "receipts: the receipt of trained is missing"),
        (remove("receipts"), "receipts: the receipt of run is missing"),
        (edit("receipts/trained.json"), None),
        (
            lambda folder: (folder / "receipts" / "trained.json").write_text("[1]"),
            "trained.json: the receipt is damaged",
        ),
        (forge_receipt, "the receipt of trained is not the one that the ledger tells of"),
        (shutil.rmtree, "the run is gone"),
    ],
)
def test_what_was_changed_is_named(run: Run, tamper: Callable[[Path], None], fault: str | None) -> None:
    """Catches an artifact that is no longer what was evaluated. White space after a receipt says nothing else."""
    tamper(run.folder)
    assert (fault in told(run)) if fault else (told(run) == "")


def test_metrics_may_grow(run: Run) -> None:
    run.log(stage="eval", task="later", mean=0.5)
    assert told(run) == ""


def test_a_ledger_put_back_to_an_older_state_lacks_the_events_of_receipts(run: Run) -> None:
    """Catches events removed at the end, with a head to match: consistent in itself, and signed by nobody."""
    lines = run.ledger.path.read_bytes().splitlines(keepends=True)[:-2]
    head = json.loads(head_path(run.ledger.path).read_text())
    size = sum(map(len, lines))
    *_, last = list(events(run.ledger.path))[:-2]
    head |= {"events": len(lines), "size": size, "start": size - len(lines[-1]), "last": last.hash}
    run.ledger.path.write_bytes(b"".join(lines))
    head_path(run.ledger.path).write_text(json.dumps(head, indent=1) + "\n")
    assert "receipts: the ledger does not hold the event 8 that the receipt of export is for" in told(run)


def test_a_run_of_another_folder_is_not_taken_for_one_of_these(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", {"seed": 5})
    shutil.copytree(other.folder, run.folder.parent / other.id)
    assert f"{other.id}/receipts: the ledger does not hold" in told(run)


def test_a_file_that_another_event_tells_of_is_known(run: Run) -> None:
    """Catches the gate's decision, written into the folder of a stage that is done, taken for a forgery; and forged."""
    path = run.folder / "eval" / "gate.json"
    path.write_text('{"ship": false}')
    assert "gate.json: was added" in told(run)
    run.ledger.append("gate.decided", run=run.id, outputs={"eval/gate.json": sha256(path)})
    assert told(run) == ""
    path.write_text('{"ship": true}')
    assert "gate.json: was changed" in told(run)


def test_a_run_at_work_is_left_out(run: Run, tmp_path: Path) -> None:
    """Catches a false alarm between the event of a stage and its folder."""
    shutil.rmtree(run.folder / "export")
    busy = Run.open(run.recipe, tmp_path, run.folder.parent, data="da7a")
    assert told(run) == ""
    busy.close()
    assert "export: is missing" in told(run)


def test_a_fact_recorded_later_is_told(run: Run, tmp_path: Path) -> None:
    """Catches a run.json that its own writer makes a fault of."""
    again = Run.open(run.recipe, tmp_path, run.folder.parent, data="da7a")
    again.record("memory", {"planned": 10, "measured": 9})
    again.close()
    assert json.loads((run.folder / "run.json").read_text())["memory"] == {"planned": 10, "measured": 9}
    assert told(run) == ""


def test_nothing_is_built_when_the_ledger_is_shut(run: Run, tmp_path: Path) -> None:
    """Catches a stage that runs unrecorded."""
    shutil.rmtree(run.folder / "export")
    head_path(run.ledger.path).unlink()
    again = Run.open(run.recipe, tmp_path, run.folder.parent, data="da7a")
    with pytest.raises(WhetError, match=r"head\.json is missing"):
        again.stage("export", lambda folder: pytest.fail("it was built"))
    again.close()
    assert not (run.folder / "export").exists()
    assert (run.folder.parent / NAME).exists()
