"""Measure how far whet lies from transformers + PEFT, with the harness of tests/parity.

    PYTHONPATH=src python bench/parity.py && python bench/table.py

Runs on the CPU in under a minute and replaces bench/results/parity.jsonl.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, origin

sys.path.insert(0, str(ROOT))

import whet
from tests.parity import harness
from tests.parity.families import FAMILIES, write_checkpoint

RESULTS = ROOT / "bench" / "results" / "parity.jsonl"


def measure(family: str, folder: Path) -> Iterator[dict[str, Any]]:
    """One line for each base: in fp32 the differences, in bf16 the distances of both from fp32."""
    write_checkpoint(folder, family)
    for base in ("fp32", "nf4"):
        found = harness.free_run(harness.whet_model(folder, family, base), harness.plain_model(folder, family, base))
        yield {"family": family, "base": base, "against": "transformers + PEFT", "whet": asdict(found)}
    write_checkpoint(folder, family, torch.bfloat16)
    for base, exact in (("bf16", "fp32"), ("nf4-bf16", "nf4")):
        ours, theirs = harness.rounding(
            harness.whet_model(folder, family, base),
            harness.plain_model(folder, family, base),
            harness.plain_model(folder, family, exact),
        )
        yield {"family": family, "base": base, "against": exact, "whet": asdict(ours), "plain": asdict(theirs)}


def main() -> None:
    where = origin()
    where["versions"]["whet"] = whet.__version__
    lines = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            for found in measure(family, Path(folder)):
                lines.append(json.dumps({"kind": "parity", "steps": harness.STEPS, **found, **where}))
                print(lines[-1], flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
