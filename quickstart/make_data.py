"""The quickstart's data set: route an entry of Python's documentation to the package it belongs to.

    python -m quickstart.make_data OUT

Writes OUT/train.jsonl and OUT/heldout.jsonl, one conversation a line: a signature and a summary in, a package's name
out. Entries whose text stands in more than one package are left out, since their answer is not determined.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from quickstart.entries import Entry, entries, held_out, summary

PACKAGES = (
    "asyncio",
    "datetime",
    "email",
    "http",
    "importlib",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "tarfile",
    "tkinter",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
RENAMED = {"_pydatetime": "datetime"}
MOST = 150
"""Entries a package at most, so that none dominates."""


def question(entry: Entry) -> str:
    return f"Which package of Python's standard library has this?\n\n{entry.signature}\n{summary(entry.doc)}"


def rows() -> list[tuple[Entry, str]]:
    """(entry, package) of the packages above, each text once."""
    by_text: dict[str, list[tuple[Entry, str]]] = defaultdict(list)
    for entry in entries():
        text = summary(entry.doc)
        if len(text) >= 20 and not entry.signature.startswith("module"):
            by_text[text.lower()].append((entry, RENAMED.get(entry.package, entry.package)))
    chosen: list[tuple[Entry, str]] = []
    taken: dict[str, int] = defaultdict(int)
    for found in by_text.values():
        entry, package = found[0]
        if len({name for _, name in found}) == 1 and package in PACKAGES and taken[package] < MOST:
            taken[package] += 1
            chosen.append((entry, package))
    return chosen


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sides: dict[str, list[str]] = {"train": [], "heldout": []}
    for entry, package in rows():
        messages = [{"role": "user", "content": question(entry)}, {"role": "assistant", "content": package}]
        side = "heldout" if held_out(entry.doc) else "train"
        sides[side].append(json.dumps({"messages": messages, "entry": f"{entry.module}.{entry.name}"}) + "\n")
    for side, lines in sides.items():
        (out / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(
        f"{len(sides['train'])} training and {len(sides['heldout'])} held-out rows of {len(PACKAGES)} packages in {out}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
