"""Preparing many short documents: read, clean, deduplicate, split and check for leaks; time and memory.

With --ready, what is made is then tokenized and packed; that has a time and a memory of its own.

    python bench/data_prep.py make OUT [--rows 1000000]      documents of about 1,000 characters, JSON lines
    python bench/data_prep.py whet OUT [--workers 2] [--ready] --out bench/results/data_prep.jsonl
    python bench/data_prep.py plain OUT --limit 50000 --out bench/results/data_prep.jsonl

`plain` is what one writes with datasketch: a loop that reads a line, repairs it with ftfy, makes 5-word shingles, asks
a MinHashLSH of 128 permutations at 0.85, splits by a hash, and looks for 13-word runs in a set of the held-out rows'.
It runs on one core over the first `--limit` rows; its rate is compared, not its total.

The documents: words drawn from 50,000 by Zipf's law; one in fifty is a copy of an earlier one, another a near-copy.
Memory is the resident memory of all processes together, looked at ten times a second. One JSON line a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import origin

WORDS, LENGTH = 50_000, 160
PERMUTATIONS, THRESHOLD, SHINGLE, GRAM = 128, 0.85, 5, 13


def make(folder: Path, rows: int, seed: int = 1) -> None:
    """rows-NN.jsonl of at most 100,000 rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 10, WORDS)]
    weights = 1 / (np.arange(WORDS) + 10)
    cumulative = np.cumsum(weights / weights.sum())
    earlier: list[list[str]] = []
    for start in range(0, rows, 100_000):
        with open(folder / f"rows-{start // 100_000:02}.jsonl", "w") as file:
            for number in range(start, min(start + 100_000, rows)):
                kind = number % 50
                if kind == 1 and earlier:
                    text = earlier[number % len(earlier)]
                elif kind == 2 and earlier:
                    text = list(earlier[(number * 7) % len(earlier)])
                    text[len(text) // 2] = "changed"
                else:
                    length = int(rng.integers(LENGTH // 2, LENGTH * 3 // 2))
                    text = [words[i] for i in np.searchsorted(cumulative, rng.random(length)).tolist()]
                    if number % 100 == 0 and len(earlier) < 5000:
                        earlier.append(text)
                file.write(json.dumps({"text": f"{' '.join(text).capitalize()}."}) + "\n")


class Memory:
    """The most resident memory that this process and its children have had together, in GiB."""

    def __init__(self) -> None:
        self.most, self.since, self._stop = 0.0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            now = sum(map(_resident, _family(os.getpid()))) / 2**30
            self.most, self.since = max(self.most, now), max(self.since, now)


def _family(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            children = [int(child) for child in file.read().split()]
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(child))]


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def whet(folder: Path, workers: int, then_ready: bool) -> dict[str, Any]:
    from whet.data.formats import Source
    from whet.data.prep.engine import Local
    from whet.data.prep.prep import prep
    from whet.data.prep.steps import Leaks, Steps

    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    seconds: dict[str, float] = {}
    gib: dict[str, float] = {}
    memory = Memory()
    last = start = time.perf_counter()

    def progress(step: str, done: int, parts: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[step] = seconds.get(step, 0.0) + now - last
        gib[step], memory.since = max(gib.get(step, 0.0), memory.since), 0.0
        last = now

    steps = Steps(sources=(Source("rows-*.jsonl"),), leaks=Leaks("drop"))
    with memory:
        version = prep("bench", steps, folder, store, engine=Local(workers), progress=progress)
    took = time.perf_counter() - start
    manifest = version.manifest
    rows = manifest["stages"]["read"]["rows"]
    result = {
        "engine": "whet", "workers": workers, "rows": rows, "seconds": round(took, 1),
        "rows_s": round(rows / took), "memory_gib": round(memory.most, 3),
        "steps": {name: round(value, 1) for name, value in seconds.items()},
        "steps_gib": {name: round(value, 2) for name, value in gib.items()}, "stages": manifest["stages"],
        "digest": manifest["digest"],
    }  # fmt: skip
    if then_ready:
        result["ready"] = ready(version, folder / "ready", workers)
    shutil.rmtree(store)
    return result


def ready(version: Any, folder: Path, workers: int) -> dict[str, Any]:
    """Tokenize the version with the built-in tokenizer and pack it into rows of 2,048."""
    from whet.data.prep.engine import Local
    from whet.data.prepare import prepare
    from whet.models.load import load_tokenizer

    folder.mkdir()
    options = {"method": "sft", "max_length": 2048, "train_on": "all", "packing": True}
    start = time.perf_counter()
    with Memory() as memory:
        summary = prepare(
            version, load_tokenizer("builtin:tiny"), folder, engine=Local(workers), progress=lambda *_: None, **options
        )
    took = time.perf_counter() - start
    shutil.rmtree(folder)
    return {"seconds": round(took, 1), "memory_gib": round(memory.most, 3), **summary}


def plain(folder: Path, limit: int) -> dict[str, Any]:
    """The same steps, in a loop, with datasketch and ftfy."""
    from datasketch import MinHash, MinHashLSH
    from ftfy import fix_text

    words = re.compile(r"\w+")
    start = time.perf_counter()
    with Memory() as memory:
        index, kept, held, rows = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS), [], [], 0
        for path in sorted(folder.glob("rows-*.jsonl")):
            for line in path.read_text().splitlines():
                if rows == limit:
                    break
                rows += 1
                text = fix_text(json.loads(line)["text"])
                found = words.findall(text.casefold())
                sketch = MinHash(num_perm=PERMUTATIONS)
                sketch.update_batch(
                    [" ".join(found[i : i + SHINGLE]).encode() for i in range(len(found) - SHINGLE + 1)]
                )
                if index.query(sketch):
                    continue
                index.insert(str(rows), sketch)
                digest = hashlib.sha256(text.encode()).digest()
                (held if digest[0] < 26 else kept).append(found)
        grams = {tuple(row[i : i + GRAM]) for row in held for i in range(len(row) - GRAM + 1)}
        leaks = sum(any(tuple(row[i : i + GRAM]) in grams for i in range(len(row) - GRAM + 1)) for row in kept)
    took = time.perf_counter() - start
    return {
        "engine": "ftfy + datasketch", "workers": 1, "rows": rows, "seconds": round(took, 1),
        "rows_s": round(rows / took), "memory_gib": round(memory.most, 3), "kept": len(kept), "leaks": leaks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "whet", "plain"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--limit", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ready", action="store_true", help="tokenize and pack what was made, too")
    parser.add_argument("--run-id", default=None)
    parser.add_argument("--out", type=Path, default=None, help="a .jsonl file to append the line to")
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.rows)
        return
    found = whet(args.folder, args.workers, args.ready) if args.what == "whet" else plain(args.folder, args.limit)
    size = sum(path.stat().st_size for path in args.folder.glob("rows-*.jsonl"))
    line = {
        "kind": "data_prep",
        "run_id": args.run_id,
        "input_gb": round(size / 1e9, 3),
        **found,
        **origin("whet", "ftfy", "rensa", "datasketch", "pyarrow"),
    }
    print(json.dumps({key: value for key, value in line.items() if key not in ("versions", "stages")}, indent=1))
    if args.out:
        with open(args.out, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
