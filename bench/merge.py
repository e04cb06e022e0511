"""Memory and time of exports by folder: a synthesised model of 8B's shape, with an adapter of rank 16 on every layer.

    python bench/merge.py [--layers 8] [--to bf16 nf4 fp8 int8 w4a16] [--gguf q4_k_m] [--folder /tmp] [--device cpu]

Each export runs in a process of its own, whose largest resident size Linux tells (VmHWM): buffers and mapped files,
not the page cache. Importing the libraries alone takes some of it, which is stated beside it. `--layers 32` is the
whole 8B.

It takes little disk at any size. Every weight of the base is read from one stretch of random numbers, as long as the
largest weight (1 GB); a weight that was merged is dropped once it is written; a GGUF file stays until it has been
compared with its source, as every export is (5 GB for an 8B in q4_k_m). So what is read lies in the page cache, and the
time is without a disk's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from environment import ROOT, origin
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from whet.export.gguf import write_ggufs
from whet.export.merge_files import NAMES, Part
from whet.export.merge_layout import layout_of
from whet.export.merge_stream import FORMATS, merge_folders
from whet.models.load import resolve
from whet.quant.gguf_mixes import MIXES

RANK = 16
MOST = 3 << 30  # bytes of host memory that an export may take, whatever the model's size
BLOCK = 1 << 22  # random numbers made at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--to", nargs="*", choices=FORMATS, default=["bf16", "nf4", "fp8", "int8", "w4a16"])
    parser.add_argument("--gguf", nargs="*", choices=MIXES, default=["q4_k_m"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "merge.jsonl")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "TO"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(Path(asked.one[0]), asked.one[1], asked.device)))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        parameters = write_model(Path(scratch), asked.layers)
        for to in (*asked.to, *asked.gguf):
            command = [sys.executable, __file__, "--one", scratch, to, "--device", asked.device]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            line = {"kind": "merge", "layers": asked.layers, "parameters": parameters, "to": to}
            line |= json.loads(done.stdout.splitlines()[-1])
            assert line["peak_bytes"] <= MOST, f"{line['peak_bytes']} bytes of host memory"
            print(line, flush=True)
            with open(asked.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | origin("compressed-tensors", "gguf", "safetensors")) + "\n")


def measured(folder: Path, to: str, device: str) -> dict[str, object]:
    """seconds by the clock; bytes of resident memory: once all is imported, and at most."""
    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        written = (
            convert(folder, Path(scratch) / "m.gguf", to, device)
            if to in MIXES
            else merge(folder, Path(scratch) / "out", to, device)
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "device": device,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "written_bytes": written,
        "peak_bytes": peak(),
        "imported_bytes": before,
    }


def merge(folder: Path, out: Path, to: str, device: str) -> int:
    """Bytes written. Each weight has a shard of its own, which is emptied once it is whole."""
    staged = out.with_name(f".{out.name}.partial")  # where an export is until all of it is there
    done = 0

    def drop(written: int, total: int) -> None:
        nonlocal done
        done += 1
        (shard,) = staged.glob(f"model-{done:05}-of-*.safetensors")
        os.truncate(shard, 0)

    merged = merge_folders(
        folder / "base", out, adapter=folder / "adapter", to=to, device=device, max_shard_size=1, track=drop
    )
    return merged.bytes


def convert(folder: Path, out: Path, quantization: str, device: str) -> int:
    """Bytes written."""
    (report,) = write_ggufs(folder / "base", {quantization: out}, device=device)
    return report.nbytes


def peak() -> int:
    """The most memory that this process has held, in bytes. (getrusage would count the parent's, from before exec.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024


def write_model(folder: Path, layers: int) -> int:
    """`folder`/base, of 8B's widths, in bf16, and `folder`/adapter; how many weights the base has."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    base, adapter = folder / "base", folder / "adapter"
    shutil.copytree(resolve("builtin:tiny"), base, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(Path(resolve("builtin:tiny")) / "tokenizer_config.json", base)
    adapter.mkdir()
    config.save_pretrained(base)
    layout = layout_of(config)
    parts = [Part(name, torch.bfloat16, shape) for name, shape in layout.shapes.items()]
    write_weights(base / "model.safetensors", parts)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(adapter)
    matrices = {}
    for name, (rows, columns) in layout.linear.items():
        matrices[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
        matrices[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(matrices, adapter / "adapter_model.safetensors")
    return sum(part.nbytes for part in parts) // 2


def write_weights(path: Path, parts: list[Part]) -> None:
    """A safetensors file whose tensors all begin at its first number: Gaussian, of the size that trained weights have.

    The safetensors library wants tensors side by side; whet's own reader, which an export uses, takes them as told.
    """
    header = {
        part.name: {"dtype": NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [0, part.nbytes]}
        for part in parts
    }
    text = json.dumps(header).encode()
    left = max(part.nbytes for part in parts)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while left > 0:
            numbers = (torch.randn(min(BLOCK, left // 2)) * 0.02).bfloat16()
            left -= file.write(numbers.view(torch.uint8).numpy().data)


if __name__ == "__main__":
    main()
