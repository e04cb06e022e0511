"""Prepared data sets, kept by what they hold. The same input and recipe give the same digest on any machine.

    STORE/NAME/
      log.jsonl       a line each time another version was made: digest, date, counts
      DIGEST/         manifest.json, card.html, train-*.jsonl, eval-*.jsonl, what was dropped: all or nothing
      .cache/         parts of what a version is made of (chunks.py)

The digest covers what is done to the rows and the ids of the rows on each side. A line of a side's files is a row: id,
source, line, and an example's content, in the order of the ids.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data.examples import Example, example_of
from whet.errors import WhetError
from whet.files import refused_when_full, sha256, write_text

SIDES = ("train", "eval")
SHOWN = 12
"""Hex digits of a digest in names and on the terminal."""


@dataclass(frozen=True)
class Version:
    """A prepared data set in its folder."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        return read

    @property
    def digest(self) -> str:
        digest: str = self.manifest["digest"]
        return digest

    def parts(self, side: str) -> list[Path]:
        """The files of a side's rows, train or eval, in order."""
        return sorted(self.folder.glob(f"{side}-*.jsonl"))

    def examples(self, side: str) -> Iterator[Example]:
        for part in self.parts(side):
            yield from read_part(part)

    def ids(self, side: str) -> set[str]:
        return {line["id"] for part in self.parts(side) for line in _lines(part)}

    def check(self) -> None:
        """Raises WhetError where a file is not what the manifest says."""
        for file in self.manifest["files"]:
            path = self.folder / file["name"]
            if not path.is_file() or sha256(path) != file["sha256"]:
                what = "is missing" if not path.is_file() else "was changed after it was made"
                fix = f"remove the folder {self.folder} and prepare the data again"
                raise WhetError(f"{file['name']} {what}", where=str(path), fix=fix)


def read_part(path: Path) -> Iterator[Example]:
    """The rows of one of a version's files."""
    for line in _lines(path):
        del line["id"]
        source, number = line.pop("source"), line.pop("line")
        yield example_of(line, source, number)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        yield from map(json.loads, file)


@dataclass(frozen=True)
class Store:
    """The versions of one data set."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / ".cache"

    def log(self) -> list[dict[str, Any]]:
        """Its versions, the oldest first."""
        try:
            text = (self.folder / "log.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def record(self, version: Version, made_of: str) -> None:
        """Make `version` the newest, and remember a digest of what it was made of."""
        entries, manifest = self.log(), version.manifest
        write_text(self._known, json.dumps({"of": made_of, "digest": manifest["digest"]}) + "\n")
        if entries and entries[-1]["digest"] == manifest["digest"]:
            return
        rows = {side: manifest["sides"][side]["rows"] for side in SIDES}
        entry = {"digest": manifest["digest"], "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **rows}
        write_text(self.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in [*entries, entry]))

    def known(self, made_of: str) -> Version | None:
        """The newest version, if that is what it was made of. Raises WhetError where a file of it was changed."""
        kept = json.loads(self._known.read_text(encoding="utf-8")) if self._known.exists() else {}
        if kept.get("of") != made_of or not (self.folder / kept["digest"][:SHOWN]).is_dir():
            return None
        version = Version(self.folder / kept["digest"][:SHOWN])
        version.check()
        return version

    @property
    def _known(self) -> Path:
        return self.folder / ".newest.json"

    def version(self, digest: str | None = None) -> Version:
        """The one whose digest begins so; None: the newest. Raises WhetError where none or several do."""
        made = list(dict.fromkeys(entry["digest"] for entry in self.log()))
        if not made:
            raise WhetError("no version was made yet", where=str(self.folder), fix="whet prep RECIPE")
        found = [d for d in made if d.startswith(digest)] if digest else made[-1:]
        if len(found) != 1:
            known = ", ".join(d[:SHOWN] for d in made)
            what = f"no version begins with {digest!r}" if not found else f"several versions begin with {digest!r}"
            raise WhetError(what, where=str(self.folder), fix=f"use one of {known}")
        return Version(self.folder / found[0][:SHOWN])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For this process alone. Raises WhetError while another prepares the same data."""
        with refused_when_full(self.folder):
            self.cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = open(self.folder / ".lock", "w")  # noqa: SIM115 (held until the end)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            fix = "wait for it to end, or stop it"
            raise WhetError("another process prepares this data", where=str(self.folder), fix=fix) from None
        finally:
            lock.close()

    def forget(self, used: set[str]) -> None:
        """Remove from the cache what the newest version was not made of."""
        for path in self.cache.iterdir():
            if path.name.partition(".")[0] not in used:
                path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Difference:
    """Ids of rows, by side: only in the newer version, only in the older, and on another side there."""

    added: dict[str, set[str]]
    removed: dict[str, set[str]]
    moved: set[str]


def difference(old: Version, new: Version) -> Difference:
    before, after = ({side: version.ids(side) for side in SIDES} for version in (old, new))
    known, kept = set().union(*before.values()), set().union(*after.values())
    return Difference(
        added={side: after[side] - known for side in SIDES},
        removed={side: before[side] - kept for side in SIDES},
        moved=(before["train"] & after["eval"]) | (before["eval"] & after["train"]),
    )


def stores(root: Path) -> list[Store]:
    """The data sets under `root`, by name."""
    return [Store(path.parent) for path in sorted(root.glob("*/log.jsonl"))]


def digest_of_rows(steps: str, ids: Mapping[str, Iterable[bytes]]) -> str:
    """Hex SHA-256. steps: a digest of what was done. ids: of each side, in order."""
    digest = hashlib.sha256(steps.encode("ascii"))
    for side in SIDES:
        digest.update(side.encode("ascii"))
        for part in ids[side]:
            digest.update(part)
    return digest.hexdigest()


def write_line(content: Mapping[str, Any], id: str, source: str, line: int) -> bytes:
    """A row as its files hold it. content: an example's, as it was kept."""
    row = {"id": id, "source": source, "line": line, **content}
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair in a tool call
        return (json.dumps(row) + "\n").encode("ascii")


def synced(path: Path) -> None:
    """Have the file on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
