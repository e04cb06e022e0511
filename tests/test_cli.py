"""The command line's own part: verbs, exit codes, what goes to which stream. Broken input has a file of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import whet
from tests.road import Here, write_recipe, write_rows
from whet import cli
from whet.recipe_docs import json_schema


def test_schema(here: Here, tmp_path: Path) -> None:
    """Catches anything but the schema on stdout, which users redirect into a file."""
    told = here("schema", cwd=tmp_path)
    assert told.code == 0
    assert json.loads(told.out) == json_schema()
    assert told.err == ""


def test_version(here: Here, tmp_path: Path) -> None:
    assert here("version", cwd=tmp_path).out == whet.__version__ + "\n"


def test_help_names_every_verb(here: Here, tmp_path: Path) -> None:
    """Freezes the verbs: scripts rest on them."""
    told = here("--help", cwd=tmp_path)
    assert told.code == 0
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == {
        "prep",
        "eval",
        "export",
        "serve",
        "run",
        "schema",
        "exec",
        "version",
    }
    verbs = "prep run schema exec version data doctor eval export serve runs judge ab"
    for verb in verbs.split():
        assert f" {verb} " in told.out


def test_markup_in_a_users_text_is_shown_as_it_is(here: Here, tmp_path: Path) -> None:
    """Catches brackets in a path, which rich would take for its own marks and drop, or stumble over."""
    told = here("run", "[bold]x[/]/none[/red].yaml", cwd=tmp_path)
    assert told.code == 2
    assert "[bold]x[/]/none[/red].yaml: there is no such recipe" in told.err


def test_a_long_message_is_not_broken(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a path with a line break in it, which can't be copied."""
    monkeypatch.setenv("COLUMNS", "40")
    name = "a-long-name-" * 10 + ".yaml"
    assert f"{name}: there is no such recipe" in here("run", name, cwd=tmp_path).err


def test_a_bug_shows_its_traceback(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bug of whet's that is told as the user's fault."""
    monkeypatch.setattr("whet.recipe.load", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here("run", "recipe.yaml", cwd=tmp_path)


def test_ctrl_c_outside_of_training_says_how_to_go_on(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a bare "Aborted!", and a hint that leaves out where the runs lie."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path)
    monkeypatch.setattr("whet.pipeline.run_recipe", interrupted)
    told = here("run", "recipe.yaml", "--runs", "elsewhere", cwd=tmp_path)
    assert told.code == 130
    assert told.err == "stopped; to go on: whet run recipe.yaml --runs elsewhere\n"


def test_a_dry_run_writes_nothing(here: Here, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path, {"export.gguf": ["q8_0"], "export.proof": False})
    before = sorted(tmp_path.rglob("*"))
    told = here("run", "recipe.yaml", "--dry-run", cwd=tmp_path)
    assert told.code == 0, told.err
    assert sorted(tmp_path.rglob("*")) == before
    assert "Which colour has number" in told.out
    assert "nothing was written" in told.out
