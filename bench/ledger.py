"""How long the ledger takes: an event written to the disk, and a ledger of many events verified.

    python bench/ledger.py [--events 100000] [--out bench/results/ledger.jsonl]

The ledger that is verified is written here without a flush to the disk after each event, which takes a second in the
place of many minutes; its bytes are those that `append` writes. A line of the output is one way to verify it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from environment import ROOT, origin

from whet.runs import signing
from whet.runs.ledger import NAME, NOTHING, Event, Head, Ledger, head_path
from whet.runs.verify import verify

APPENDED = 100
OUTPUTS = {f"train-{i:05}.arrow": f"{i:064x}" for i in range(4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "ledger.jsonl")
    asked = parser.parse_args()
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    with tempfile.TemporaryDirectory() as folder:
        plain, signed = Path(folder, "plain"), Path(folder, "signed")
        sizes = {path: write(path, asked.events, k) for path, k in ((plain, None), (signed, key))}
        lines = [
            {"what": "append", "signed": True, "seconds": round(append(Path(folder, "appended"), key), 4)},
            measured("chain", plain, sizes[plain], lambda path: verify(path)),
            measured("chain, signed head", signed, sizes[signed], lambda path: verify(path, public_key=public)),
            measured(
                "chain, every signature",
                signed,
                sizes[signed],
                lambda path: verify(path, public_key=public, every_signature=True),
            ),
        ]
    where = origin("cryptography")
    with open(asked.out, "a", encoding="utf-8") as file:
        for line in lines:
            line = {"kind": "ledger", **line} | ({"events": asked.events} if line["what"] != "append" else {})
            print(line)
            file.write(json.dumps(line | where) + "\n")


def measured(what: str, folder: Path, size: int, check: Callable[[Path], list[object]]) -> dict[str, object]:
    """Of three times the one that took the processor least; of what takes long, the only one.

    seconds: by the clock, in which others may use the machine too. cpu_seconds: of the processor, this process alone.
    """
    times = []
    for _ in range(1 if "every" in what else 3):
        start, cpu = time.perf_counter(), time.process_time()
        faults = check(folder / NAME)
        times.append((time.process_time() - cpu, time.perf_counter() - start))
        assert faults == [], faults[:3]
    cpu, seconds = min(times)
    signed = folder.name == "signed"
    return {"what": what, "signed": signed, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "bytes": size}


def append(folder: Path, key: Ed25519PrivateKey) -> float:
    """Seconds an event takes to be written, flushed to the disk, with its head: the median."""
    folder.mkdir()
    ledger, seconds = Ledger(folder / NAME, key), []
    for _ in range(APPENDED):
        start = time.perf_counter()
        ledger.append("data.done", run="run-1", outputs=OUTPUTS)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[APPENDED // 2]


def write(folder: Path, count: int, key: Ed25519PrivateKey | None) -> int:
    """A ledger of `count` events like those of a run's stages; its bytes."""
    folder.mkdir()
    previous, size, line = NOTHING, 0, b""
    with open(folder / NAME, "wb") as file:
        for i in range(count):
            event = Event(
                seq=i,
                time="2026-01-01T00:00:00.000+00:00",
                who="ci@host",
                what="data.done",
                run=f"run-{i // 8}",
                inputs={"data": previous},
                outputs=OUTPUTS,
                facts={"folder": "data", "metrics": {"bytes": i, "sha256": previous}},
                previous=previous,
            )
            if key is not None:
                event = replace(event, signature=signing.sign(key, event.signed_part))
            line, previous = event.line + b"\n", event.hash
            size += file.write(line)
    head = Head(count, size, size - len(line), previous)
    if key is not None:
        head = replace(head, key=signing.fingerprint(key.public_key()))
        head = replace(head, signature=signing.sign(key, head.signed_part))
    head_path(folder / NAME).write_text(head.text, encoding="utf-8")
    return size


if __name__ == "__main__":
    main()
