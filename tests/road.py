"""What the tests of the recipe's road share: small data sets, recipes over them, and the command line."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from whet.data.prep.versions import Version
from whet.recipe import Recipe
from whet.recipe_data import FOLDER, version_of

COLOURS = ("red", "green", "blue")
QUESTION = "Which colour has number {}?"
CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": QUESTION.format(i)},
            {"role": "assistant", "content": COLOURS[i % 3]},
        ]
    }
    for i in range(24)
]
RECIPE: dict[str, Any] = {
    "name": "colours",
    "model": {"base": "builtin:tiny", "load": "32bit", "max_seq_length": 64},
    "adapter": {"r": 4, "dropout": 0.1},
    "data": {"sources": [{"path": "rows.jsonl"}], "split": {"eval": 0.25}},
    "train": {"max_steps": 2, "tokens_per_step": 128, "micro_batch": 2, "learning_rate": 1.0e-3},
    "eval": None,
}


@dataclass(frozen=True)
class Told:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    lines = [json.dumps(row) + "\n" for row in (CONVERSATIONS if rows is None else rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """recipe.yaml in `folder`: RECIPE with `changes`, whose keys are dotted, as {"train.max_steps": 8}."""
    recipe = copy.deepcopy(RECIPE)
    for name, value in (changes or {}).items():
        *sections, key = name.split(".")
        section = recipe
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def start(*arguments: str | Path, cwd: Path, **options: Any) -> subprocess.Popen[str]:
    """`whet ...` in a new interpreter. tests/warm.py starts sooner."""
    command = [sys.executable, "-m", "whet.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes, **options)


class Here:
    """`whet ...` in this process, which has its libraries loaded already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *arguments: str | Path, cwd: Path) -> Told:
        from whet import cli  # loads typer and rich: not every test needs them

        self.monkeypatch.chdir(cwd)
        self.monkeypatch.setattr(sys, "argv", ["whet", *map(str, arguments)])
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self.capfd.readouterr()
        return Told(int(ended.value.code or 0), out, err)


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """What a verb of the command line turns off for its whole process is on again for the next test."""
    names = ("whet", "bitsandbytes", "trl", "accelerate")
    loggers = [logging.getLogger(name) for name in names]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        if logger.handlers != handlers or logger.level != level:
            logger.handlers[:] = handlers
            logger.setLevel(level)
    if (transformers := sys.modules.get("transformers.utils.logging")) is not None:
        transformers.enable_progress_bar()
        transformers.set_verbosity_warning()
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.enable_progress_bars()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """here("run", "recipe.yaml", cwd=folder)."""
    monkeypatch.setenv("COLUMNS", "200")
    return Here(monkeypatch, capfd)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def only_run(root: Path) -> Path:
    (folder,) = runs_in(root)
    return folder


def runs_in(root: Path) -> list[Path]:
    """The runs' folders; the prepared data lies beside them."""
    return [path for path in root.iterdir() if path.is_dir() and path.name != FOLDER]


def prepared(recipe: Recipe, base: Path) -> Version:
    """The version of a recipe's data that `whet run` makes in `base`."""
    return version_of(recipe, base, base / "runs", Console(quiet=True))
