"""Deduplication and the leak gate, step by step, against datasketch and plain Python on the same documents.

    python bench/data_steps.py --out bench/results/data_steps.jsonl [--rows 20000] [--signatures 1000000]

Documents of about 1,000 characters, words drawn from a Zipf distribution over 50,000; a tenth are near copies of
another (one of 145 words changed) and a tenth are held out. Beside it, done plainly: datasketch's MinHash of 128
permutations over sets of 5-word shingles and its MinHashLSH; a set of the held-out documents' 13-word tuples. Each step
runs in a process of its own, on one core, whose peak resident memory is given. `clusters` is measured once more on
`--signatures` made-up signatures in memory maps, a tenth of them near copies.

One JSON line a step: us_row (processor time for each row it is given, the best of three), peak_gib, and found, the
share of planted copies or leaks that it finds. Of `clusters of many`, wall-clock time, once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from whet.data.similar.duplicates import Signatures, banding, clusters, sign
from whet.data.similar.leaks import Counts, LeakIndex

WORDS = 145
VOCABULARY = 50_000
THRESHOLD = 0.85
BATCH = 1024
REPEATS = 3
PERMUTATIONS = 128


class Documents:
    """texts; copy_of: of each copy's number, the original's; held_out: numbers; leaks: training rows that hold one."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        vocabulary = np.array(["".join(rng.choice(letters, rng.integers(2, 11))) for _ in range(VOCABULARY)])
        share = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
        drawn = np.searchsorted(share / share[-1], rng.random((rows, WORDS)))
        self.copy_of = {rows // 2 + i: i for i in range(rows // 10)}
        for copy, original in self.copy_of.items():
            drawn[copy] = drawn[original]
            drawn[copy, 70] = rng.integers(VOCABULARY)
        self.held_out = list(range(rows - rows // 10, rows))
        self.leaks = {rows // 4 + i: rows - 1 - i for i in range(rows // 100)}
        for row, held_out in self.leaks.items():
            drawn[row, 30:60] = drawn[held_out, 70:100]
        self.texts = [f"{' '.join(words)}.".capitalize() for words in vocabulary[drawn].tolist()]

    @property
    def training(self) -> list[str]:
        return self.texts[: self.held_out[0]]


# ------------------------------------------------------------------ whet


def whet_sign(documents: Documents) -> dict[str, Any]:
    return timed(len(documents.texts), lambda: _signed(documents.texts))


def whet_clusters(documents: Documents) -> dict[str, Any]:
    signatures = _signed(documents.texts)
    result = timed(len(documents.texts), lambda: clusters(signatures, THRESHOLD))
    labels = clusters(signatures, THRESHOLD)
    pairs = documents.copy_of.items()
    return result | {"found": round(sum(labels[a] == labels[b] for a, b in pairs) / len(pairs), 4)}


def whet_leaks(documents: Documents) -> dict[str, Any]:
    held_out = [documents.texts[i] for i in documents.held_out]
    rows = documents.training
    chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    build = timed(len(held_out), lambda: LeakIndex.build(held_out))
    index = LeakIndex.build(held_out)

    found: set[int] = set()

    def gate() -> None:
        counts = Counts.merged([index.count(chunk).shifted(i * BATCH) for i, chunk in enumerate(chunks)])
        touched = counts.touched.tolist()
        live = index.live(counts)
        for i in range(0, len(touched), BATCH):
            batch = touched[i : i + BATCH]
            found.update(batch[row] for row in live.find([rows[row] for row in batch]).row.tolist())

    return timed(len(rows), gate) | {"build_us_row": build["us_row"]} | share_found(found, documents)


def share_found(found: set[int], documents: Documents) -> dict[str, Any]:
    """others: rows found to leak in which nothing was planted."""
    share = len(found & documents.leaks.keys()) / len(documents.leaks)
    return {"found": round(share, 4), "others": len(found - documents.leaks.keys())}


def _signed(texts: Sequence[str]) -> Signatures:
    return Signatures.concatenate([sign(texts[i : i + BATCH], THRESHOLD) for i in range(0, len(texts), BATCH)])


def many_clusters(rows: int) -> dict[str, Any]:
    """Of made-up signatures in files, so that the memory is that of `clusters`."""
    with tempfile.TemporaryDirectory() as folder:
        maps = _made_up(rows, Path(folder))
        forget_peak()
        started = time.perf_counter()
        labels = clusters(maps, THRESHOLD)
        took = time.perf_counter() - started
    near = rows // 10
    found = float((labels[-near:] == labels[:near]).mean())
    return {
        "rows": rows, "seconds": round(took, 2), "us_row": round(took / rows * 1e6, 2),
        "peak_gib": peak_gib(), "found": round(found, 4),
    }  # fmt: skip


def _made_up(rows: int, folder: Path) -> Signatures:
    """The last tenth repeats the first with one place in twenty changed (a similarity of 0.95)."""
    from whet.data.similar.duplicates import _bands

    bands, size = banding(THRESHOLD)
    maps = Signatures(
        np.lib.format.open_memmap(folder / "exact.npy", "w+", np.uint64, (rows, 2)),
        np.lib.format.open_memmap(folder / "bands.npy", "w+", np.uint64, (rows, bands)),
        np.lib.format.open_memmap(folder / "minhash.npy", "w+", np.uint32, (rows, PERMUTATIONS)),
    )
    rng = np.random.default_rng(1)
    near = rows // 10
    for start in range(0, rows, near):
        part = slice(start, min(start + near, rows))
        shape = (part.stop - start, PERMUTATIONS)
        fresh = rng.integers(0, 2**32, shape, dtype=np.uint32)
        if part.stop == rows:
            fresh = np.where(rng.random(shape) < 0.05, fresh, maps.minhash[: shape[0]])
        maps.exact[part] = rng.integers(0, 2**64, (shape[0], 2), dtype=np.uint64)
        maps.bands[part], maps.minhash[part] = _bands(fresh, bands, size), fresh
    return maps


# ------------------------------------------------------------------ done plainly


def plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def plain_minhash(text: str) -> Any:
    from datasketch import MinHash

    words = plain_words(text)
    minhash = MinHash(num_perm=PERMUTATIONS)
    minhash.update_batch([" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)])
    return minhash


def datasketch_sign(documents: Documents) -> dict[str, Any]:
    return timed(len(documents.texts), lambda: [plain_minhash(text) for text in documents.texts])


def datasketch_clusters(documents: Documents) -> dict[str, Any]:
    from datasketch import MinHashLSH

    signatures = [plain_minhash(text) for text in documents.texts]
    near: dict[int, list[int]] = {}

    def insert_and_query() -> None:
        lsh = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        for i, signature in enumerate(signatures):
            near[i] = lsh.query(signature)
            lsh.insert(i, signature)

    result = timed(len(signatures), insert_and_query)
    pairs = documents.copy_of.items()
    return result | {"found": round(sum(b in near[a] for a, b in pairs) / len(pairs), 4)}


def plain_leaks(documents: Documents) -> dict[str, Any]:
    held_out = [documents.texts[i] for i in documents.held_out]
    found: set[int] = set()

    def runs(text: str) -> list[tuple[str, ...]]:
        words = plain_words(text)
        return [tuple(words[i : i + 13]) for i in range(len(words) - 12)]

    grams: set[tuple[str, ...]] = set()
    build = timed(len(held_out), lambda: grams.update(*map(runs, held_out)))

    def gate() -> None:
        found.update(i for i, text in enumerate(documents.training) if any(run in grams for run in runs(text)))

    result = timed(len(documents.training), gate)
    share = len(found & documents.leaks.keys()) / len(documents.leaks)
    return result | {
        "build_us_row": build["us_row"],
        "found": round(share, 4),
        "others": len(found) - len(documents.leaks),
    }


# ------------------------------------------------------------------ measuring

STEPS: dict[tuple[str, str], Callable[[Documents], dict[str, Any]]] = {
    ("sign", "whet"): whet_sign,
    ("sign", "datasketch"): datasketch_sign,
    ("clusters", "whet"): whet_clusters,
    ("clusters", "datasketch"): datasketch_clusters,
    ("leaks", "whet"): whet_leaks,
    ("leaks", "plain Python"): plain_leaks,
}


def timed(rows: int, run: Callable[[], object]) -> dict[str, Any]:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        run()
        best = min(best, time.process_time() - started)
    return {"rows": rows, "us_row": round(best / rows * 1e6, 2)}


def peak_gib() -> float:
    """The most resident memory of this process since it started, or since `forget_peak`. Linux."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20, 3)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def step(name: tuple[str, str], rows: int) -> dict[str, Any]:
    documents = Documents(rows)
    forget_peak()
    result = STEPS[name](documents)
    characters = sum(map(len, documents.texts)) / rows
    return {"characters": round(characters)} | result | {"peak_gib": peak_gib()}


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of a call in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--signatures", type=int, default=1_000_000)
    arguments = parser.parse_args()
    from environment import origin  # imports torch, whose memory would count for every step

    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"
    about = origin("numpy", "rensa", "datasketch")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as out:
        for name in STEPS:
            write(
                out,
                {"kind": "data_steps", "step": name[0], "engine": name[1]} | alone(step, name, arguments.rows) | about,
            )
        many = alone(many_clusters, arguments.signatures)
        write(out, {"kind": "data_steps", "step": "clusters of many", "engine": "whet"} | many | about)


def write(out: Any, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=out, flush=True)
    shown = {name: value for name, value in line.items() if name not in ("hardware", "versions", "commit", "dirty")}
    print(json.dumps(shown), file=sys.stderr)


if __name__ == "__main__":
    main()
