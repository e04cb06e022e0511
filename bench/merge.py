"""Memory and time of merging by folder: a synthesised model of 8B's shape, with an adapter of rank 16 on every layer.

    python bench/merge.py [--layers 8] [--to bf16 nf4 fp8 int8 w4a16] [--folder /tmp] [--device cpu]

Each merge runs in a process of its own, whose largest resident size the system reports (ru_maxrss). Importing the
libraries alone takes some of it, which is stated beside it. Random weights take as long as trained ones.
A line of the output is one format. `--layers 32` is the whole 8B: 16 GB are read, and up to as many written.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from environment import ROOT, origin
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from whet.export.merge_files import Part, ShardWriter, strips
from whet.export.merge_layout import layout_of
from whet.export.merge_stream import FORMATS, merge_folders

RANK = 16
MOST = 3 << 30  # bytes of host memory that a merge may take, whatever the model's size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--to", nargs="+", choices=FORMATS, default=["bf16", "nf4", "fp8", "int8", "w4a16"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "merge.jsonl")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "TO"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(Path(asked.one[0]), asked.one[1], asked.device)))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        parameters = write_model(Path(scratch), asked.layers)
        for to in asked.to:
            command = [sys.executable, __file__, "--one", scratch, to]
            command += ["--device", asked.device] if asked.device else []
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            line = {"kind": "merge", "layers": asked.layers, "parameters": parameters, "to": to}
            line |= json.loads(done.stdout.splitlines()[-1])
            assert line["peak_bytes"] <= MOST, f"{line['peak_bytes']} bytes of host memory"
            print(line)
            with open(asked.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | origin("compressed-tensors", "safetensors")) + "\n")


def measured(folder: Path, to: str, device: str | None) -> dict[str, object]:
    """seconds by the clock, the disk's part included; bytes of resident memory: imported, and at most."""
    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = merge_folders(folder / "base", Path(scratch) / "out", adapter=folder / "adapter", to=to, device=device)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "written_bytes": found.bytes,
        "peak_bytes": peak(),
        "imported_bytes": before,
    }


def peak() -> int:
    """The most memory that this process has held, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_model(folder: Path, layers: int) -> int:
    """`folder`/base, of 8B's widths, in bf16, and `folder`/adapter; how many weights the base has."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config.save_pretrained(base)
    layout = layout_of(config)
    parts = [Part(name, torch.bfloat16, shape) for name, shape in layout.shapes.items()]
    with ShardWriter(base, [[part] for part in parts]) as writer:
        for part in parts:
            for start, rows in random_strips(part.shape):
                writer.write(part.name, rows, start)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(adapter)
    matrices = {}
    for name, (rows, columns) in layout.linear.items():
        matrices[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
        matrices[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(matrices, adapter / "adapter_model.safetensors")
    return sum(part.bytes for part in parts) // 2


def random_strips(shape: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows): Gaussian, of the size that trained weights have."""
    for start, stop in strips(shape):
        yield start, (torch.randn((stop - start, *shape[1:])) * 0.02).bfloat16()


if __name__ == "__main__":
    main()
