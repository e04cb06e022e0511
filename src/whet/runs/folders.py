"""The runs under a folder: which there are, whether a process is at work on one, what its files hold."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from whet.errors import WhetError

MARKS = ("run.json", "recipe.yaml", "metrics.jsonl", ".lock")
FIX = "put the file back from a copy, or run the recipe again in another --runs folder"


def run_folders(root: Path) -> list[Path]:
    """The folders of runs directly under `root`, by name. Raises WhetError where `root` is no folder."""
    if not root.is_dir():
        raise WhetError("there is no such folder", where=str(root), fix="name the folder of the runs: --runs")
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return [path for path in folders if any((path / mark).exists() for mark in MARKS)]


def find(root: Path, name: str) -> Path:
    """The run that `name` means: its folder's path, its id, or the beginning of its id. Raises WhetError."""
    if (Path(name) / "run.json").is_file():
        return Path(name)
    folders = run_folders(root)
    found = [path for path in folders if path.name == name] or [p for p in folders if p.name.startswith(name)]
    if len(found) != 1:
        what = f"no run is called {name!r}" if not found else f"several runs begin with {name!r}"
        known = ", ".join(path.name for path in found or folders)
        raise WhetError(what, where=str(root), fix=f"use one of {known}" if known else "whet run RECIPE")
    return found[0]


@contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Have a run to oneself; False, without it, while a process is at work on it."""
    try:
        file = open(folder / ".lock")  # noqa: SIM115 (held until the end)
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def at_work(folder: Path) -> bool:
    """Whether a process is at work on the run."""
    with lock(folder) as free:
        return not free


def facts(folder: Path) -> dict[str, Any]:
    """What run.json holds. Raises WhetError."""
    return _object(folder / "run.json", json.loads)


def recipe_values(folder: Path) -> dict[str, Any]:
    """What recipe.yaml holds, unchecked. Raises WhetError."""
    return _object(folder / "recipe.yaml", yaml.safe_load)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, but for a last one that a crash cut short. Raises WhetError at one that is none."""
    path = folder / "metrics.jsonl"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise WhetError(f"cannot read it: {error.strerror}", where=str(path), fix=FIX) from None
    lines = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise WhetError("this line is no JSON object", where=f"{path}:{number}", fix=FIX) from None
    return lines


def _object(path: Path, parse: Any) -> dict[str, Any]:
    try:
        read = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WhetError(f"{path.name} is missing", where=str(path.parent), fix=FIX) from None
    except OSError as error:
        raise WhetError(f"cannot read it: {error.strerror}", where=str(path), fix=FIX) from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise WhetError("it is damaged", where=str(path), fix=FIX) from None
    if not isinstance(read, dict):
        raise WhetError("it is damaged", where=str(path), fix=FIX)
    return read
