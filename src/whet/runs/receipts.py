"""Receipts: what each stage of a run made, by SHA-256, and the event of the ledger that says so.

    runs/ID/receipts/STAGE.json    {"event", "hash", "files": {name: SHA-256}}

They lie in the run's folder, apart from the ledger, so that events missing at the ledger's end show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from whet.errors import WhetError
from whet.files import sha256, write_text
from whet.runs.ledger import Event

FOLDER = "receipts"
FIX = "put the file back from a copy, or run the recipe again in another --runs folder"
RUN = "run"
"""The receipt of what lies in the run's folder itself: recipe.yaml and run.json."""


@dataclass(frozen=True)
class Receipt:
    """event: its place in the ledger. hash: SHA-256 of its line. files: SHA-256 by path within the stage's folder."""

    event: int
    hash: str
    files: Mapping[str, str]

    @classmethod
    def of(cls, event: Event) -> Receipt:
        return cls(event.seq, event.hash, dict(event.outputs))


def keep(run: Path, stage: str, receipt: Receipt) -> None:
    """Write the receipt of a stage into the folder `run`, in the place of an earlier one."""
    (run / FOLDER).mkdir(exist_ok=True)
    write_text(run / FOLDER / f"{stage}.json", json.dumps(vars(receipt), indent=1) + "\n")


def read_receipts(run: Path) -> dict[str, Receipt]:
    """The receipts in the folder `run`, by stage. Raises WhetError where one is damaged."""
    return {path.stem: _read(path) for path in sorted((run / FOLDER).glob("*.json"))}


def _read(path: Path) -> Receipt:
    try:
        receipt = Receipt(**json.loads(path.read_text(encoding="utf-8")))
        whole = isinstance(receipt.files, dict) and type(receipt.event) is int
    except OSError as error:
        raise WhetError(f"cannot read the receipt: {error.strerror}", where=str(path), fix=FIX) from None
    except (ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise WhetError("the receipt is damaged", where=str(path), fix=FIX)
    return receipt


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by its path there; each is on the disk when this returns."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = sha256(path)
    return found


def changes(folder: Path, files: Mapping[str, str]) -> list[tuple[str, str]]:
    """(path, what is wrong with it) of each file under `folder` that is not as `files`, SHA-256 by path, says."""
    found = []
    for name, digest in files.items():
        path = folder / name
        try:
            if sha256(path) != digest:
                found.append((str(path), "was changed after it was made"))
        except FileNotFoundError:
            found.append((str(path), "is missing"))
        except OSError as error:
            found.append((str(path), f"cannot be read: {error.strerror}"))
    return found


def added(folder: Path, files: Mapping[str, str]) -> list[tuple[str, str]]:
    """(path, what is wrong with it) of each file under `folder` that `files` does not know."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return [
        (str(p), "was added after the stage was done") for p in paths if p.relative_to(folder).as_posix() not in files
    ]
