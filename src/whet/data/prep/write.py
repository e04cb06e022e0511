"""The files of a version: rows in the order of their ids, a manifest, a data card, a list of the rows that were bad.

The rows of a version are cut into parts by the first bits of their ids, so that one part at a time is put in order. Ids
are digests: parts are of one size, and as many on any machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.data.examples import example_of, spoken
from whet.data.prep import chunks, versions
from whet.data.prep.rows import Duplicates, Rows, places
from whet.data.prep.versions import SIDES
from whet.data.report.card import write_card
from whet.data.report.statistics import Stats, of_batch
from whet.files import write_text

PART = 64 << 20
"""Characters of a part, at most about."""


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` of a chunk's file: which of them stay, and which are held out."""

    path: str
    start: int
    stop: int
    kept: NDArray[np.bool_] = field(repr=False)
    held: NDArray[np.bool_] = field(repr=False)


@dataclass(frozen=True)
class Part:
    number: int
    slices: list[Slice]
    folder: str


def plan_parts(
    tasks: Sequence[chunks.Task], rows: Rows, kept: NDArray[np.bool_], held: NDArray[np.bool_], folder: Path
) -> list[Part]:
    """A chunk's rows are in the order of their ids, so a part of it is a slice."""
    size = int(rows.characters[kept].sum())
    bits = max(0, (size - 1) // PART).bit_length()
    offsets = rows.offsets(len(tasks))
    parts = [Part(number, [], str(folder)) for number in range(1 << bits)]
    edges = np.array([number << (64 - bits) for number in range(1, 1 << bits)], np.uint64)
    for task, start, stop in zip(tasks, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        cuts = [start, *(start + np.searchsorted(rows.id[start:stop, 0], edges)).tolist(), stop]
        for part, low, high in zip(parts, cuts[:-1], cuts[1:], strict=True):
            if kept[low:high].any():
                path = str(task.path("arrow"))
                part.slices.append(Slice(path, low - start, high - start, kept[low:high], held[low:high]))
    return parts


def write_part(part: Part) -> dict[str, dict[str, Any]]:
    """Write the part's rows of each side that has any; their counts."""
    found: list[tuple[str, str, int, str, bool]] = []
    for s in part.slices:
        table = chunks.read_rows_of(Path(s.path), s.start, s.stop).filter(s.kept)
        columns = (table.column(name).to_pylist() for name in ("id", "source", "line", "content"))
        found += zip(*columns, s.held[s.kept].tolist(), strict=True)
    found.sort(key=lambda row: row[:3])
    return {side: counts for side in SIDES if (counts := _write_side(part, side, found))}


def _write_side(part: Part, side: str, rows: Sequence[tuple[Any, str, int, str, bool]]) -> dict[str, Any] | None:
    mine = [row for row in rows if row[4] == (side == "eval")]
    if not mine:
        return None
    path, digest, said = Path(part.folder) / f"{side}-{part.number:05}.jsonl", hashlib.sha256(), []
    with open(path, "wb") as file:
        for id, source, line, content, _ in mine:
            values = json.loads(content)
            raw = versions.write_line(values, id.hex(), source, line)
            digest.update(raw)
            file.write(raw)
            said.append("\n".join(spoken(example_of(values, source, line))))
    versions.synced(path)
    return {
        "name": path.name,
        "rows": len(mine),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
        "characters": sum(map(len, said)),
        "statistics": of_batch(said).to_json(),
    }


# ------------------------------------------------------------------ the manifest


def sides_of(written: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    sides = {}
    for side in SIDES:
        parts = [part[side] for part in written if side in part]
        total = of_batch([])
        for part in parts:
            total = total.merge(Stats.from_json(part["statistics"]))
        counts = {name: sum(part[name] for part in parts) for name in ("rows", "characters")}
        sides[side] = {**counts, "statistics": total.to_json()}
    return sides


def files_of(written: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    names = ("name", "rows", "bytes", "sha256")
    return [{name: part[side][name] for name in names} for side in SIDES for part in written if side in part]


def sources_of(tasks: Sequence[chunks.Task], made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each file, by name: its digest, bytes, rows and bad rows."""
    found = {piece.source: {"sha256": piece.sha256, "bytes": piece.bytes} for t in tasks for piece in t.chunk.pieces}
    counts: dict[str, Counter[str]] = {name: Counter() for name in found}
    for summary in made:
        for name, rows in summary["sources"].items():
            counts.setdefault(name, Counter()).update(rows)
    return [
        {"source": name, **found.get(name, {}), "rows": count["rows"], "bad": count["bad"]}
        for name, count in sorted(counts.items())
    ]


def write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    write_card(manifest, folder / "card.html")
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def in_order(faults: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By file and line."""

    def place(fault: Mapping[str, Any]) -> tuple[str, int]:
        source, _, line = str(fault["where"]).rpartition(":")
        return (source, int(line)) if line.isdigit() else (str(fault["where"]), 0)

    return sorted(faults, key=place)


def quarantine(faults: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Place and reason of each bad row; what it holds stays where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults))


def list_duplicates(found: Duplicates, tasks: Sequence[chunks.Task], rows: Rows, path: Path) -> None:
    """Where each dropped row was, and the one that stayed for it."""
    dropped, kept = (places(chosen, rows, tasks) for chosen in (found.dropped, found.kept))
    pairs = sorted(zip(dropped, kept, strict=True))
    write_text(path, "".join(json.dumps({"dropped": a, "kept": b}, ensure_ascii=False) + "\n" for a, b in pairs))


def kind_of(reason: str) -> str:
    """A reason without what is one row's own."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'...'", reason)).split(":")[0]


def copy_vaults(tasks: Sequence[chunks.Task], folder: Path) -> None:
    vaults = [task.path("vault") for task in tasks if task.path("vault").exists()]
    if vaults:
        (folder / "vault").mkdir(mode=0o700)
        for number, path in enumerate(vaults):
            shutil.copyfile(path, folder / "vault" / f"{number:05}.vault")
