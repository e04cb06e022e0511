"""How far llama.cpp's logits of an exported file lie from transformers', for every family and part of one.

    PYTHONPATH=src python bench/gguf_logits.py

Models are tiny and random, files in F32; the cases are those of tests/export/gguf_cases.py. Runs on the CPU in a minute
and replaces bench/results/gguf_logits.jsonl, a line a family:
max_difference: of a logit, over the tokens and vocabulary of all its cases. spread: standard deviation of its logits.
kl: the largest mean over a text of KL(transformers || llama.cpp), in nats a token. top_1: share of tokens at which both
put the same first. cases: the largest difference in each.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from environment import ROOT, origin
from numpy.typing import NDArray

sys.path.insert(0, str(ROOT))

import whet
from tests.export.gguf_cases import CASES, WITHOUT_WINDOW, Measured, furthest, measure
from whet.export import llama_cpp

RESULTS = ROOT / "bench" / "results" / "gguf_logits.jsonl"


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def kl(case: Measured) -> float:
    expected, found = log_softmax(case.expected), log_softmax(case.found)
    return float((np.exp(expected) * (expected - found)).sum(axis=1).mean())


def line(family: str, cases: dict[str, Measured]) -> dict[str, Any]:
    same = [case.expected.argmax(1) == case.found.argmax(1) for case in cases.values()]
    return {
        "kind": "gguf_logits",
        "family": family,
        "max_difference": max(furthest(case.found, case.expected) for case in cases.values()),
        "spread": float(np.mean([case.expected.std() for case in cases.values()])),
        "kl": max(kl(case) for case in cases.values()),
        "top_1": float(np.concatenate(same).mean()),
        "cases": {name: furthest(case.found, case.expected) for name, case in cases.items()},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(Path(scratch))
    where = origin("gguf")
    where["versions"] |= {"whet": whet.__version__, "node-llama-cpp": llama_cpp.VERSION}
    lines = []
    for family in dict.fromkeys(case.family for case in CASES.values()):
        # beyond a window that llama.cpp does not have the two differ, and the file says so
        of_it = {n: m for n, m in measured.items() if CASES[n].family == family and n not in WITHOUT_WINDOW}
        lines.append(json.dumps(line(family, of_it) | where))
        print(lines[-1])
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
