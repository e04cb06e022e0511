"""Checkpoints that can be trusted: a checkpoint counts only once it is sealed, and only while its seal holds.

The trainer writes a checkpoint's files one after another, and a crash may leave some of them. A sealed checkpoint holds
`sealed.json`, written last, with the SHA-256 of every file; one without it, or with a file that does not match, is
never resumed from.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from whet.files import sha256, write_text

log = logging.getLogger("whet")
SEAL = "sealed.json"


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint to the disk and write its seal."""
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[str(path.relative_to(folder))] = sha256(path)
    write_text(folder / SEAL, json.dumps(digests, indent=1))


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint is sealed and every file is as it was then."""
    try:
        digests = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all(sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def newest_whole(folder: Path) -> Path | None:
    """The latest checkpoint-STEP under `folder` whose seal holds.

    Later ones, damaged, are named in the log and removed: the trainer keeps the latest two, by their steps, and would
    keep these in the place of whole ones.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        if is_whole(checkpoint):
            return checkpoint
        log.warning("%s is incomplete or damaged: going back to the one before", checkpoint)
        shutil.rmtree(checkpoint)
    return None
