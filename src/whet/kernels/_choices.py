"""What was measured once on a kind of card: a file in the user's cache folder, so that later processes need not."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

log = logging.getLogger("whet")

NAME = "cublaslt.json"


def kept(kind: str) -> dict[str, int]:
    """Of a kind of card and library: for each problem, the number of its algorithm in the heuristic's order."""
    return _sound(_read().get(kind))


def _sound(found: Any) -> dict[str, int]:
    if not isinstance(found, dict):
        return {}
    return {problem: n for problem, n in found.items() if type(n) is int and n >= 0}


def keep(kind: str, problem: str, number: int) -> None:
    """Add one to the file. What can't be written is timed again by the next process, and the log says why."""
    kinds = _read()
    kinds[kind] = _sound(kinds.get(kind)) | {problem: number}
    try:
        place = path()
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            whole = Path(folder) / NAME
            whole.write_text(json.dumps(kinds, indent=1), encoding="utf-8")
            os.replace(whole, place)
    except (OSError, RuntimeError) as error:
        log.info("what was measured of products is not kept: %s", error)


def path() -> Path:
    return folder() / NAME


def folder() -> Path:
    """The user's cache folder for whet. RuntimeError: no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whet"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder
        log.info("what was measured of products can't be read: %s", error)
        return {}
    return found if isinstance(found, dict) else {}
