"""How fast GGUF's block formats are encoded, and how near the decoded weights are -> bench/results/quantize.jsonl.

    python bench/quantize.py [--device cuda]

On the CPU: every format beside llama.cpp's own quantizer (see ggml.py), the same random weights on the same threads,
turn and turn about; then a small Llama as Q4_K_M. The machine may be shared, so the ratio is of processor seconds.
--device cuda: a Llama of 8B as Q4_K_M, tensor by tensor from bf16 in host memory to bytes in host memory; and on small
tensors, how many of each format's blocks are the same bytes as the CPU's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import ROOT, origin
from gguf.quants import dequantize
from numpy.typing import NDArray

from whet.quant.gguf_mixes import ModelFacts, wanted_type
from whet.quant.gguf_types import TYPES, GGUFType
from whet.quant.kernels import compiled

Floats = NDArray[np.float32]
FORMATS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
SHAPE = (512, 4096)
ROUNDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quantize.jsonl")
    asked = parser.parse_args()
    measured = on_gpu() if asked.device == "cuda" else on_cpu()
    where = origin("gguf", "numba", "numpy")
    ratios = []
    with open(asked.out, "a", encoding="utf-8") as file:
        for line in measured:
            print(line, flush=True)
            file.write(json.dumps({"kind": "quantize", "device": asked.device, **line} | where) + "\n")
            file.flush()
            if "times_llama_cpp" in line:
                ratios.append(f"{line['what']:<8}{line['times_llama_cpp']:>6.2f}{line.get('rmse_ratio', ''):>8}")
    if ratios:
        print("\ntype     speed   error   against llama.cpp's, in processor time", *ratios, sep="\n")


def on_cpu() -> Iterator[dict[str, Any]]:
    from ggml import GGML, RELEASE

    from whet.export.gguf_pieces import on_threads

    llama_cpp, release = GGML(), json.loads(RELEASE.read_text(encoding="utf-8"))["release"]
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)

    def ours(kind: GGUFType, x: Floats) -> None:
        on_threads(lambda rows: kind.encode(x[rows], kernels=compiled()), x.shape)

    def theirs(kind: GGUFType, x: Floats) -> None:
        on_threads(lambda rows: llama_cpp.quantize(kind.ggml, x[rows]), x.shape)

    for name in FORMATS:
        kind = TYPES[name]
        start = time.process_time()
        kind.encode(x[:2], kernels=compiled())
        compiling = time.process_time() - start
        seconds = [spent(lambda: ours(kind, x)), spent(lambda: theirs(kind, x))]  # noqa: B023 - called at once
        for _ in range(ROUNDS - 1):
            seconds[0] = least(seconds[0], spent(lambda: ours(kind, x)))  # noqa: B023
            seconds[1] = least(seconds[1], spent(lambda: theirs(kind, x)))  # noqa: B023
        own, other = rmse(x, kind.encode(x), kind), rmse(x, llama_cpp.quantize(kind.ggml, x), kind)
        errors = {"rmse": own, "llama_cpp_rmse": other, "rmse_ratio": round(own / other, 4)}
        line = {"what": name, "compile_seconds": round(compiling, 1), **compared(x.size, *seconds), **errors}
        yield line | {"llama_cpp": release}

    tensors = [(TYPES[kind], np.resize(x, shape)) for kind, shape in llama(8, 512, 1792, 256, 4096)]
    every = [
        spent(lambda: [ours(kind, x) for kind, x in tensors]),
        spent(lambda: [theirs(kind, x) for kind, x in tensors]),
    ]
    weights = sum(x.size for _, x in tensors)
    yield {"what": "q4_k_m", **compared(weights, *every), "llama_cpp": release}


def on_gpu() -> Iterator[dict[str, Any]]:
    small = torch.randn(64, 1024)
    importance = torch.rand(1024)
    for name in FORMATS:
        kind, same = TYPES[name], []
        for h in (None, importance):
            cpu = kind.encode(small.numpy(), None if h is None else h.numpy(), compiled())
            gpu = kind.encode_torch(small.cuda(), None if h is None else h.cuda()).cpu().numpy()
            blocks = (cpu == gpu).reshape(-1, kind.block_bytes).all(1)
            same.append(float(blocks.mean()))
        yield {"what": name, "same_bytes_as_cpu": same[0], "same_bytes_as_cpu_with_importance": same[1]}
    hosts: dict[tuple[int, int], torch.Tensor] = {}
    parts = {"upload": 0.0, "encode": 0.0, "download": 0.0}
    weights = nbytes = 0
    for name, shape in llama(32, 4096, 14336, 1024, 128256):
        if shape not in hosts:
            hosts[shape] = torch.randn(shape, device="cuda", dtype=torch.bfloat16).cpu()
        x = timed(parts, "upload", lambda: hosts[shape].cuda())  # noqa: B023
        encoded = timed(parts, "encode", lambda: TYPES[name].encode_torch(x))  # noqa: B023
        host = timed(parts, "download", lambda: encoded.cpu())  # noqa: B023
        weights, nbytes = weights + x.numel(), nbytes + host.numel()
    seconds = {part: round(value, 2) for part, value in parts.items()}
    peak = torch.cuda.max_memory_allocated()
    total = round(sum(parts.values()), 2)
    yield {"what": "8B q4_k_m", "weights": weights, "bytes": nbytes, "seconds": total, **seconds, "peak_bytes": peak}


def llama(layers: int, width: int, mlp: int, kv: int, vocab: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Type and shape of each matrix of a Llama as Q4_K_M."""
    facts = ModelFacts("llama", layers=layers, heads=32, kv_heads=32 * kv // width, tied=False)
    shapes = {
        "attn_q": (width, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_output": (width, width),
        "ffn_gate": (mlp, width),
        "ffn_up": (mlp, width),
        "ffn_down": (width, mlp),
    }
    names = {f"blk.{i}.{part}.weight": shape for i in range(layers) for part, shape in shapes.items()}
    for name, shape in (names | {"token_embd.weight": (vocab, width), "output.weight": (vocab, width)}).items():
        yield wanted_type("q4_k_m", name, 2, facts), shape


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processors."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def least(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return min(a[0], b[0]), min(a[1], b[1])


def compared(weights: int, ours: tuple[float, float], theirs: tuple[float, float]) -> dict[str, Any]:
    """Millions of weights a second of the clock, and how many times llama.cpp's processor seconds go into ours."""
    return {
        "weights": weights,
        "million_a_second": round(weights / ours[0] / 1e6, 1),
        "llama_cpp_million_a_second": round(weights / theirs[0] / 1e6, 1),
        "cpu_seconds": round(ours[1], 4),
        "llama_cpp_cpu_seconds": round(theirs[1], 4),
        "times_llama_cpp": round(theirs[1] / ours[1], 2),
    }


def rmse(x: Floats, data: NDArray[np.uint8], kind: GGUFType) -> float:
    """Root-mean-square error relative to the weights'."""
    decoded = dequantize(data, kind.ggml).reshape(x.shape)
    return float(np.sqrt(np.mean((decoded - x) ** 2) / np.mean(x**2)))


def timed(parts: dict[str, float], part: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    parts[part] += time.perf_counter() - start
    return result


if __name__ == "__main__":
    main()
