"""`whet runs report`, `compare` and `track`: what they write, where, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.runs.folders import write_run
from whet import cli_report
from whet.errors import WhetError

app = typer.Typer()
for verb in (cli_report.report, cli_report.compare, cli_report.track):
    app.command()(verb)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("desk-5be1c0d8a9", "desk-77aa01bc2d"):
        write_run(tmp_path / "runs", name, steps=4)
    return tmp_path / "runs"


def whet(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output.replace("\n", "")


def test_a_report_lies_in_the_runs_folder_or_where_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    told = whet("report", "desk-5b", "--runs", root)
    path = root / "desk-5be1c0d8a9" / "report.html"
    assert told == f"wrote {path}"
    text = path.read_text()
    assert "did not look at this run" not in text  # the doctor did
    whet("report", root / "desk-77aa01bc2d", "--out", tmp_path / "new" / "r.html")
    assert "desk-77aa01bc2d" in (tmp_path / "new" / "r.html").read_text()


def test_a_comparison_lies_beside_the_runs(root: Path) -> None:
    assert whet("compare", "desk-5b", "desk-7", "--runs", root) == f"wrote {root / 'compare.html'}"
    assert (root / "compare.html").is_file()


def test_a_run_is_sent_afterwards(root: Path) -> None:
    lines = (root / "desk-5be1c0d8a9" / "metrics.jsonl").read_text().count("\n")
    assert whet("track", "desk-5b", "--tensorboard", "--runs", root) == f"sent {lines} lines of desk-5be1c0d8a9"
    assert list((root / "desk-5be1c0d8a9" / "tensorboard").iterdir())


def test_what_is_refused(root: Path) -> None:
    with pytest.raises(WhetError, match="no tracker is named"):
        whet("track", "desk-5b", "--runs", root)
    with pytest.raises(WhetError, match="several runs begin with"):
        whet("report", "desk", "--runs", root)
    with pytest.raises(WhetError, match="no run is called"):
        whet("compare", "desk-5b", "other", "--runs", root)
