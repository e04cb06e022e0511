"""Relative root-mean-square error of GGUF's block formats on random weights -> bench/results/blocks.jsonl.

PYTHONPATH=src:. python bench/blocks.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from environment import ROOT, origin

from whet.quant.gguf_types import TYPES

SHAPE = (512, 4096)


def error(name: str, weights: np.ndarray) -> float:
    kind = TYPES[name]
    decoded = kind.decode(kind.encode(weights))
    return float(np.sqrt(np.mean((decoded - weights) ** 2) / np.mean(weights**2)))


def main() -> None:
    rng = np.random.default_rng(0)
    gaussian = rng.standard_normal(SHAPE).astype(np.float32)
    heavy = rng.standard_t(3, SHAPE).astype(np.float32)
    lines = [
        {
            "kind": "blocks",
            "type": name,
            "gaussian": error(name, gaussian),
            "heavy_tails": error(name, heavy),
            **origin(),
        }
        for name in ("q8_0", "q6_k", "q4_k")
    ]
    path = ROOT / "bench" / "results" / "blocks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
