"""What an importance matrix is worth: quantized files of `builtin:tiny` in llama.cpp, rounded with one and without.

    PYTHONPATH=src python bench/imatrix.py [--quantizations q4_0 q2_k] [--out bench/results/imatrix.jsonl]

The matrix is measured on documentation the model was trained on, and the files are judged on entries kept for
evaluation. A line is a quantization: kl, the mean of KL(model || file) in nats a token, tail, its 99th percentile, and
top_1, the share of tokens for which both find the same next one likeliest; plain and guided. A few minutes on two
cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from environment import ROOT, origin
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(ROOT / "quickstart"))

from entries import entries, held_out

import whet
from whet.export.artifacts import CHUNK, CHUNKS
from whet.export.gguf import write_ggufs
from whet.export.imatrix_measure import measure_imatrix
from whet.export.llama_cpp import Reading, read_logits

QUANTIZATIONS = ("q2_k", "q3_k_s", "q4_0", "iq4_nl", "q4_k_m")
JUDGED, LENGTH = 32, 64  # texts, and tokens of each
MODEL = Path(whet.__file__).parent / "builtin" / "tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "imatrix.jsonl")
    parser.add_argument("--quantizations", nargs="*", default=QUANTIZATIONS)
    asked = parser.parse_args()
    known, kept = texts()
    imatrix = measure_imatrix(
        MODEL, known, chunk_size=CHUNK, max_chunks=CHUNKS, device="cpu", dataset="documentation of Python"
    )
    sequences = token_ids(kept)
    expected = model_log_probabilities(sequences)
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for how, matrix in (("plain", None), ("guided", imatrix)):
            files = {name: Path(scratch, f"{name}-{how}.gguf") for name in asked.quantizations}
            write_ggufs(MODEL, files, imatrix=matrix)
            for name, path in files.items():
                rows = read_logits([Reading(path, ids) for ids in sequences])
                found[name, how] = [log_softmax(logits) for logits in rows]
        for name in asked.quantizations:
            line: dict[str, object] = {"kind": "imatrix", "quantization": name, "tokens": imatrix.chunks * CHUNK}
            for how in ("plain", "guided"):
                line |= {f"{key}_{how}": value for key, value in compared(expected, found[name, how]).items()}
            lines.append(line | origin("gguf"))
            print(lines[-1])
    asked.out.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def texts() -> tuple[list[str], list[str]]:
    """Documentation the model has seen, and documentation kept from it, in a fixed order without regard to modules."""
    known, kept = [], []
    for entry in entries():
        (kept if held_out(entry.doc) else known).append(f"{entry.signature}\n{entry.doc}\n\n")
    order = np.random.default_rng(0).permutation(len(known))
    return [known[i] for i in order], kept


def token_ids(kept: list[str]) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(MODEL)("".join(kept), add_special_tokens=False)["input_ids"]
    return [ids[start : start + LENGTH] for start in range(0, JUDGED * LENGTH, LENGTH)]


@torch.no_grad()
def model_log_probabilities(sequences: list[list[int]]) -> list[NDArray[np.float64]]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return [log_softmax(model(torch.tensor([ids])).logits[0].numpy()) for ids in sequences]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def compared(expected: list[NDArray[np.float64]], found: list[NDArray[np.float64]]) -> dict[str, float]:
    p, q = np.concatenate(expected), np.concatenate(found)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    same = float((p.argmax(1) == q.argmax(1)).mean())
    return {"kl": round(float(kl.mean()), 5), "tail": round(float(np.quantile(kl, 0.99)), 5), "top_1": round(same, 4)}


if __name__ == "__main__":
    main()
