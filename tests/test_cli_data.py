"""`whet prep`, `whet data` and `whet doctor data` on the command line: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.road import CONVERSATIONS, Here, write_recipe, write_rows
from whet.data.prep.versions import Store
from whet.files import sha256
from whet.runs.audit import audit
from whet.runs.ledger import events

ASKED = [
    {
        "messages": [
            {"role": "user", "content": f"My mail is ann{i}@acme.com. Which colour has number {i}?"},
            {"role": "assistant", "content": colour},
        ]
    }
    for i, colour in enumerate(["red", "green", "blue"] * 8)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path)
    return tmp_path


def test_prep_makes_a_version_and_shows_what_was_done(here: Here, folder: Path) -> None:
    told = here("prep", "recipe.yaml", cwd=folder)
    assert told.code == 0, told.err
    for sign in ("read", "rows 24", "dedup", "split", "leaks", "done"):
        assert sign in told.out
    version = Store(folder / "runs" / "data" / "colours").version()
    assert {"manifest.json", "card.html", "train-00000.jsonl", "eval-00000.jsonl"} <= {
        path.name for path in version.folder.iterdir()
    }
    assert here("prep", "recipe.yaml", cwd=folder).out == told.out


def test_the_ledger_tells_of_preparing(here: Here, folder: Path) -> None:
    """Catches a version that nobody wrote down, one that is written down again, and one made without a ledger."""
    assert here("prep", "recipe.yaml", cwd=folder).code == 0
    assert here("prep", "recipe.yaml", cwd=folder).code == 0
    runs = folder / "runs"
    told = list(events(runs / "ledger.jsonl"))
    assert [event.what for event in told] == ["prep.started", "prep.done"]
    assert told[0].inputs == told[1].inputs
    assert told[1].outputs == {str(p.relative_to(runs)): sha256(p) for p in runs.glob("data/colours/*/manifest.json")}
    assert audit(runs) == []
    write_rows(folder / "rows.jsonl", CONVERSATIONS[:20])
    (runs / "ledger.jsonl").write_text("forged\n")
    refused = here("prep", "recipe.yaml", cwd=folder)
    assert refused.code == 2
    assert "the ledger is not as it was left" in refused.err
    assert len(Store(runs / "data" / "colours").log()) == 1


def test_run_learns_from_the_version_that_prep_made(here: Here, folder: Path) -> None:
    """Catches two ways to prepare data."""
    assert here("prep", "recipe.yaml", cwd=folder).code == 0
    told = here("run", "recipe.yaml", cwd=folder)
    assert told.code == 0, told.err
    store = Store(folder / "runs" / "data" / "colours")
    assert store.version().digest[:12] in told.out
    assert len(store.log()) == 1


def test_versions_are_listed_shown_and_compared(here: Here, folder: Path) -> None:
    here("prep", "recipe.yaml", cwd=folder)
    store = Store(folder / "runs" / "data" / "colours")
    old = store.version().digest
    write_rows(folder / "rows.jsonl", CONVERSATIONS[:20])
    here("prep", "recipe.yaml", cwd=folder)
    log = here("data", "log", cwd=folder).out
    assert log.index(old[:12]) < log.index(store.version().digest[:12])
    assert "card" in here("data", "show", "--version", old[:6], cwd=folder).out
    told = here("data", "diff", old[:6], cwd=folder)
    removed = [int(line.rpartition("-")[2]) for line in told.out.splitlines()[:2]]
    assert sum(removed) == 4
    assert "moved 0" in told.out


def test_what_is_not_there_is_said(here: Here, folder: Path) -> None:
    told = here("data", "log", cwd=folder)
    assert told.code == 2
    assert "no data was prepared yet" in told.err
    here("prep", "recipe.yaml", cwd=folder)
    told = here("data", "show", "--version", "zz", cwd=folder)
    assert told.code == 2
    assert "no version begins with 'zz'" in told.err


def test_what_redaction_took_out_comes_back_with_the_key(here: Here, folder: Path) -> None:
    write_rows(folder / "rows.jsonl", ASKED)
    assert here("data", "key", "secret.key", cwd=folder).code == 0
    redact = {"policy": "gdpr-basic", "key": "secret.key", "vault": True}
    write_recipe(folder, {"data.redact": redact})
    told = here("prep", "recipe.yaml", cwd=folder)
    assert told.code == 0, told.err
    assert "EMAIL 24" in told.out
    assert "PERSON is not fully covered" in told.out
    version = Store(folder / "runs" / "data" / "colours").version()
    path = version.folder / "train-00000.jsonl"
    assert "acme.com" not in path.read_text(encoding="utf-8")
    told = here("data", "restore", path, "--vault", version.folder / "vault", "--key", "secret.key", cwd=folder)
    assert told.code == 0, told.err
    contents = {row["messages"][0]["content"] for row in map(json.loads, told.out.splitlines())}
    assert contents <= {row["messages"][0]["content"] for row in ASKED}
    here("data", "key", "other.key", cwd=folder)
    told = here("data", "restore", path, "--vault", version.folder / "vault", "--key", "other.key", cwd=folder)
    assert told.code == 2
    assert "acme.com" not in told.out + told.err


def test_a_key_that_is_missing_is_said(here: Here, folder: Path) -> None:
    write_recipe(folder, {"data.redact": {"policy": "gdpr-basic"}})
    told = here("prep", "recipe.yaml", cwd=folder)
    assert told.code == 2
    assert "key" in told.err
    assert "fix" in told.err


def test_a_preview_shows_rows_as_the_model_sees_them(here: Here, folder: Path) -> None:
    told = here("data", "preview", "recipe.yaml", "rows.html", "--rows", "3", cwd=folder)
    assert told.code == 0, told.err
    page = (folder / "rows.html").read_text(encoding="utf-8")
    assert "Which colour has number" in page
    assert "<script" not in page


def test_the_doctor_s_errors_are_its_exit_code(here: Here, folder: Path) -> None:
    clean = here("doctor", "data", "rows.jsonl", cwd=folder)
    assert clean.code == 0, clean.err
    write_rows(folder / "held.jsonl", CONVERSATIONS[:3])
    told = here("doctor", "data", "rows.jsonl", "--eval", "held.jsonl", "--json", cwd=folder)
    assert told.code == 2
    found = [finding for finding in json.loads(told.out) if finding["severity"] == "error"]
    assert any("rows.jsonl:1" in str(finding) for finding in found)


def test_the_doctor_looks_for_the_questions_of_tasks(here: Here, folder: Path) -> None:
    """Catches an option that is read and passed to nobody, and one that cannot be repeated."""
    asked = CONVERSATIONS[4]["messages"][0]["content"]
    for name, question in (("a.jsonl", "Who wrote the play that is about a prince of Denmark?"), ("b.jsonl", asked)):
        (folder / name).write_text(json.dumps({"question": question, "answer": "x"}) + "\n", encoding="utf-8")
    assert here("doctor", "data", "rows.jsonl", "--task", "a.jsonl", cwd=folder).code == 0
    told = here("doctor", "data", "rows.jsonl", "--task", "a.jsonl", "--task", "b.jsonl", "--json", cwd=folder)
    assert told.code == 2
    (leak,) = (finding for finding in json.loads(told.out) if finding["severity"] == "error")
    assert "rows.jsonl:5" in str(leak)
    assert "b.jsonl:1" in str(leak)
    assert "a.jsonl" in here("doctor", "data", "rows.jsonl", "--task", "gone/a.jsonl", cwd=folder).err
