"""The text that `builtin:tiny` is trained on: the documentation of the Pythons on this machine, and talk about it.

    python -m tiny.corpus OUT [PYTHON ...]      PYTHON: further interpreters whose documentation to read

Writes OUT/train.jsonl and OUT/heldout.jsonl, one {"text": ...} or {"messages": [...]} a line. Entries that
`quickstart.entries.held_out` keeps for evaluation are in heldout.jsonl alone, whatever module they came from.
Licence of the text: PSF-2.0.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from quickstart.entries import Entry, entries, held_out, summary

QUESTIONS = (
    "What does {thing} do?",
    "Explain {thing} in a sentence.",
    "Describe {thing}.",
    "I found {thing} in some code. What is it for?",
    "Summarise the documentation of {thing}.",
)


def dump() -> None:
    """Print this interpreter's entries and language topics as JSON lines: what another interpreter is run for."""
    from pydoc_data.topics import topics

    for entry in entries():
        print(json.dumps(asdict(entry)))
    for name, text in sorted(topics.items()):
        print(json.dumps({"topic": name, "doc": text}))


def read(pythons: list[str]) -> tuple[list[Entry], list[str]]:
    """Entries and topics of all interpreters, each text once."""
    found: dict[tuple[str, str], Entry] = {}
    topics: dict[str, None] = {}
    for python in pythons:
        lines = subprocess.run(
            [python, "-c", "from tiny.corpus import dump; dump()"], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for line in lines:
            values = json.loads(line)
            if "topic" in values:
                topics.setdefault(values["doc"])
            else:
                entry = Entry(**values)
                found.setdefault((entry.name, entry.doc), entry)
    return list(found.values()), list(topics)


def reference(entry: Entry) -> str:
    """An entry as a page of a reference manual."""
    return f"{entry.module}: {entry.signature}\n\n{entry.doc}"


def conversation(entry: Entry, rng: random.Random) -> list[dict[str, str]]:
    """A question about an entry and its answer."""
    thing = entry.module if entry.signature.startswith("module") else f"{entry.module}.{entry.name}"
    question = rng.choice(QUESTIONS).format(thing=f"`{thing}`")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": summary(entry.doc)}]


def rows(chosen: list[Entry], rng: random.Random) -> Iterator[dict[str, object]]:
    for entry in chosen:
        yield {"text": reference(entry)}
        if len(entry.doc) >= 20:
            yield {"messages": conversation(entry, rng)}


def main(out: Path, pythons: list[str]) -> None:
    rng = random.Random(0)
    found, topics = read([sys.executable, *pythons])
    kept = [entry for entry in found if held_out(entry.doc)]
    kept_text = {summary(entry.doc).lower() for entry in kept}
    seen = [entry for entry in found if summary(entry.doc).lower() not in kept_text]
    train = [*rows(seen, rng), *({"text": topic} for topic in topics)]
    rng.shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", train), ("heldout", list(rows(kept, rng)))):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        print(f"{name}: {len(chosen)} rows, {sum(len(json.dumps(row)) for row in chosen) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
