"""The verbs of `whet ab`, from two files to the results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.evals.ab.studies import KIND, SYSTEMS, side, vote, write_answers
from whet.cli_ab import ab
from whet.errors import WhetError
from whet.evals.ab import extra
from whet.evals.ab.study import load
from whet.evals.ab.votes import Log


def run(*words: object) -> Result:
    return CliRunner().invoke(ab, [str(word) for word in words], catch_exceptions=False)


def test_from_two_files_to_the_results(tmp_path: Path) -> None:
    """Catches a link that is printed and opens nothing, and results that do not leave the terminal."""
    a, b = write_answers(tmp_path, 8)
    folder = tmp_path / "study"
    made = run("new", folder, a, b, "--grader", "ada", "--url", "https://ab.example.org/")
    links = dict(line.split(" ") for line in made.output.splitlines() if "/join#" in line)
    assert set(links) == {"owner", "ada"}
    assert "8 comparisons a grader; 0 with the same answers" in made.output
    study = load(folder)
    with Log(folder / "votes.jsonl", study) as log:
        token = links["ada"].removeprefix("https://ab.example.org/join#")
        assert log.state.who(token) == ("grader", "ada")
        for seat in study.seats("ada"):
            vote(log, "ada", seat, side(seat, KIND))
    with pytest.raises(WhetError, match="the study is open"):
        run("results", folder)
    renewed = run("link", folder, "ada").output
    assert links["ada"].split("#")[1] not in renewed
    run("close", folder)
    shown = run("results", folder, "--json", tmp_path / "r.json", "--csv", tmp_path / "v.csv")
    assert f"{SYSTEMS[1]} against {SYSTEMS[0]}, 8 items" in shown.output
    assert "8 won, 0 tied, 0 lost" in shown.output
    assert json.loads((tmp_path / "r.json").read_text())["duels"][0]["wins"] == 8
    assert len(list(csv.reader((tmp_path / "v.csv").read_text().splitlines()))) == 9


def test_an_export_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    a, b = write_answers(tmp_path)
    run("new", tmp_path / "study", a, b)
    run("close", tmp_path / "study")
    run("results", tmp_path / "study", "--csv", tmp_path / "a new folder" / "v.csv")
    assert (tmp_path / "a new folder" / "v.csv").exists()
    with pytest.raises(WhetError, match="a file stands where a folder is to be"):
        run("results", tmp_path / "study", "--csv", a / "v.csv")


def test_names_of_systems_and_markup_are_shown_as_they_are(tmp_path: Path) -> None:
    """Catches rich taking a name in brackets for markup, which would vanish from the output."""
    a, b = write_answers(tmp_path)
    made = run("new", tmp_path / "study", f"[red]base={a}", f"tuned={b}", "--grader", "[bold]ada")
    assert "[bold]ada http" in made.output
    run("close", tmp_path / "study")
    assert "tuned against [red]base" in run("results", tmp_path / "study").output


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ModuleNotFoundError where the user should read which extra to install."""
    monkeypatch.setattr(extra, "PACKAGES", ("fastapi", "a_package_that_is_not_there"))
    with pytest.raises(WhetError, match="needs a_package_that_is_not_there") as refused:
        run("serve", tmp_path)
    assert refused.value.fix == 'pip install "whet[ab]"'
