"""Every kernel of src/whet/kernels at the 8B shape on this GPU, in bf16, against the time it cannot go below.

    python bench/kernel_speed.py --out bench/results/kernels.jsonl --run-id ID [--tokens 4096 16384] [--only NAME ...]

That time, the bound, is the larger of two: the bytes that must move (each input once, each output once) at the rate of
a large copy, and the matrix products' FLOP at the rate of a large GEMM in the same precision. The rates are measured
first, in the same process: a GEMM by itself, for calls that take no longer than LONG_US, and many of them in a row for
longer ones, in which the card's power holds it below that. `gemm_tflop_s` of a line is the one its bound was made with.
A ratio is the measured time over the bound. What no bound holds: exponentials, and in attention the half of each block
on the diagonal that is multiplied for nothing.

Kernels under SHORT_US are replayed in a CUDA graph over sets of tensors that together exceed the L2 cache several
times, so that neither launches nor cached inputs count; longer ones are timed one by one, each after passes over a
buffer larger than L2, during which the call is launched. As in training, L2 then holds someone else's values, some not
written back yet. CUDA events; medians. One JSON line a kernel; one that fails has its error there, and the script then
exits 1.

Shapes: T tokens, D model width, F width of the MLP, H query heads and G key heads of size d, W = (H + 2 G) d, V
vocabulary, r LoRA's rank, R columns for adapters beside a weight.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

# Kernels are imported where they are used: one that cannot be imported fails alone. It also keeps whet out of other
# engines' runs: transformers looks for a package named `kernels`, and in this folder imports this file.

SHORT_US = 250
LONG_US = 2500
SUSTAINED_US = 20_000  # of GEMMs in a row
REPLAYED_US = 3000  # of one replay
REPLAYS = 15
TIMED_US = 40_000  # of all calls timed one by one
L2_TIMES = 6  # what rotated sets hold together, in L2 caches
MOST_SETS = 64
SOFTCAP = 50.0  # Gemma 2's
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of a model (Llama-3.1-8B), and of what is cut into pieces."""

    D: int = 4096
    F: int = 14336
    H: int = 32
    G: int = 8
    d: int = 128
    V: int = 128256
    r: int = 16
    R: int = 64
    row: int = 2048  # tokens of a row, and at most of a mixed document
    head_rows: int = 4096  # labelled rows of `linear_log_probs`
    chunk: int = 1024  # of them in one buffer of logits

    @property
    def W(self) -> int:
        return (self.H + 2 * self.G) * self.d


@dataclass(frozen=True)
class Device:
    """Where tensors are, and in what precision. Values are random: a GPU multiplies zeros faster."""

    name: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.name, dtype=dtype or self.dtype).mul_(std)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=self.name, dtype=dtype or self.dtype)

    def random_bytes(self, *shape: int) -> Tensor:
        return torch.randint(256, shape, device=self.name, dtype=torch.uint8)


@dataclass(frozen=True)
class Work:
    """A call with its tensors: what it must read and write, once each. What changes in place is in both."""

    run: Callable[[], object]
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    flops: int = 0  # of matrix products
    fp8: bool = False  # their precision, else 16 bits
    restore: Callable[[], object] | None = None  # after a call whose output is no input for the next

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.reads, *self.writes))


@dataclass(frozen=True)
class Case:
    kernel: str
    shape: str
    tokens: int | None
    make: Callable[[], Work]


def unallocated(x: Tensor) -> Tensor:
    """As large as x: stands for an output that the kernel allocates."""
    return x.to("meta")


# ------------------------------------------------------------------ norms, rope, gated activations


def rms_norm(s: Sizes, on: Device, T: int) -> Work:
    from whet.kernels.rms_norm import rms_norm

    x, w, out = on.normal(T, s.D), on.normal(s.D), on.empty(T, s.D + s.R)[:, : s.D]
    return Work(lambda: rms_norm(x, w, EPS, out=out), [x, w], [out])


def rms_norm_backward(s: Sizes, on: Device, T: int) -> Work:
    from whet.kernels.rms_norm import rms_norm_backward

    dy, x, residual, w, out = *(on.normal(T, s.D) for _ in range(3)), on.normal(s.D), on.empty(T, s.D)
    return Work(lambda: rms_norm_backward(dy, x, w, EPS, residual=residual, out=out), [dy, x, residual, w], [out])


def tables(s: Sizes, on: Device, T: int) -> tuple[Tensor, Tensor]:
    angles = on.normal(min(T, s.row), s.d // 2, std=10.0, dtype=torch.float32)
    return angles.cos(), angles.sin()


def rope(s: Sizes, on: Device, T: int) -> Work:
    from whet.kernels.rope import rope

    qkv, (cos, sin) = on.normal(T, s.W), tables(s, on, T)
    qk = qkv[:, : (s.H + s.G) * s.d]
    return Work(lambda: rope(qkv, cos, sin, s.H, s.G, out=qkv), [qk, cos, sin], [qk])


def rope_backward(s: Sizes, on: Device, T: int) -> Work:
    from whet.kernels.rope import rope_backward

    gradients, (cos, sin) = [on.normal(T, heads, s.d) for heads in (s.H, s.G, s.G)], tables(s, on, T)
    out = on.empty(T, s.W + s.R)[:, : s.W]
    return Work(lambda: rope_backward(*gradients, cos, sin, out=out), [*gradients, cos, sin], [out])


def glu(s: Sizes, on: Device, T: int) -> Work:
    from whet.kernels.glu import glu

    gate_up, out = on.normal(T, 2 * s.F), on.empty(T, s.F + s.R)[:, : s.F]
    return Work(lambda: glu(gate_up, "silu", out=out), [gate_up], [out])


def glu_backward(s: Sizes, on: Device, T: int) -> Work:
    from whet.kernels.glu import glu_backward

    dact, gate_up, act = on.normal(T, s.F), on.normal(T, 2 * s.F), on.empty(T, s.F)
    out = on.empty(T, 2 * s.F + s.R)[:, : 2 * s.F]
    return Work(lambda: glu_backward(dact, gate_up, "silu", act=act, out=out), [dact, gate_up], [act, out])


def mixed_lengths(T: int, longest: int) -> list[int]:
    """Documents of log-normal lengths, median 270 tokens, that hold T tokens; the same at every call."""
    draw, lengths = torch.Generator().manual_seed(1), []
    while T > 0:
        length = torch.exp(torch.randn(1, generator=draw) * 0.9 + 5.6).clamp(min(16, longest), longest)
        lengths.append(min(int(length.item()), T))
        T -= lengths[-1]
    return lengths


def heads(s: Sizes, on: Device, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v: slices of one projection, as in the block."""
    q, k, v = on.normal(T, s.W).unflatten(1, (-1, s.d)).split((s.H, s.G, s.G), dim=1)
    return q, k, v


def layout(s: Sizes, on: Device, lengths: list[int]) -> Any:
    from whet.kernels.attention import Documents, Rows

    if len(set(lengths)) == 1:
        return Rows(len(lengths), lengths[0])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return Documents(bounds.to(on.name, torch.int32), max(lengths))


def product_flops(s: Sizes, lengths: list[int]) -> int:
    """Of one of attention's products: d multiplications and additions a head and pair of query and visible key."""
    return 2 * s.d * s.H * sum(length * (length + 1) // 2 for length in lengths)


def attention(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.attention import attention

    qkv, documents = heads(s, on, sum(lengths)), layout(s, on, lengths)
    run = partial(attention, *qkv, documents, scale=s.d**-0.5)
    out, saved = run()
    return Work(run, qkv, [unallocated(out), unallocated(saved[0])], 2 * product_flops(s, lengths))


def attention_backward(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.attention import attention, attention_backward

    qkv, documents = heads(s, on, sum(lengths)), layout(s, on, lengths)
    out, saved = attention(*qkv, documents, scale=s.d**-0.5)
    dout = on.normal(*out.shape)
    run = partial(attention_backward, dout, *qkv, out, saved, documents, scale=s.d**-0.5)
    return Work(run, [dout, *qkv, out, saved[0]], [unallocated(x) for x in qkv], 5 * product_flops(s, lengths))


def flash(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.flash import flash_triton

    qkv, documents = heads(s, on, sum(lengths)), layout(s, on, lengths)
    bounds = getattr(documents, "cu_seqlens", None)
    run = partial(flash_triton, *qkv, bounds, documents.longest, scale=s.d**-0.5, softcap=SOFTCAP)
    return Work(run, qkv, [unallocated(x) for x in run()], 2 * product_flops(s, lengths))


def flash_backward(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.flash import flash_backward_triton, flash_triton

    qkv, documents = heads(s, on, sum(lengths)), layout(s, on, lengths)
    given = (getattr(documents, "cu_seqlens", None), documents.longest)
    options = {"scale": s.d**-0.5, "softcap": SOFTCAP}
    out, lse = flash_triton(*qkv, *given, **options)
    dout = on.normal(*out.shape)
    run = partial(flash_backward_triton, dout, *qkv, out, lse, *given, **options)
    return Work(run, [dout, *qkv, out, lse], [unallocated(x) for x in qkv], 5 * product_flops(s, lengths))


# ------------------------------------------------------------------ weights


def nf4_weight(on: Device, N: int, K: int) -> tuple[Any, list[Tensor]]:
    """A double-quantized weight and its tensors."""
    from whet.kernels.nf4 import NF4Weight

    blocks, single = -(-N * K // 64), torch.float32
    packed, absmax = on.random_bytes(-(-N * K // 2)), on.random_bytes(blocks)
    code, code2 = (on.normal(n, dtype=single).sort().values for n in (16, 256))
    absmax2, offset = on.normal(-(-blocks // 256), dtype=single), on.normal(dtype=single)
    weight = NF4Weight(packed, absmax, code, N, K, on.dtype, code2, absmax2, offset)
    return weight, [packed, absmax, code, code2, absmax2, offset]


def dequantize_nf4(s: Sizes, on: Device, N: int, K: int) -> Work:
    from whet.kernels.nf4 import dequantize_nf4

    weight, reads = nf4_weight(on, N, K)
    out = on.empty(N + s.R, K + s.R)[:N, :K]
    return Work(lambda: dequantize_nf4(weight, out), reads, [out])


def dequantize_nf4_fp8(s: Sizes, on: Device, N: int, K: int, transposed: bool) -> Work:
    from whet.kernels.fp8 import E4M3, dequantize_nf4_fp8, weight_scales

    weight, reads = nf4_weight(on, N, K)
    scales = weight_scales(weight)
    out = on.empty(*((K, N) if transposed else (N, K)), dtype=E4M3)
    run = partial(dequantize_nf4_fp8, weight, *scales, transposed=transposed, out=out)
    return Work(run, [*reads, scales[transposed]], [out])


def extend(s: Sizes, on: Device, parts: Sequence[int], K: int) -> Work:
    """parts: outputs of each stacked layer. Adapters are in fp32, as PEFT holds them."""
    from whet.kernels.extend import extend

    N, single = sum(parts), torch.float32
    e = on.empty(N + s.R, K + s.R)
    downs = [on.normal(s.r, K, dtype=single) for _ in parts]
    ups, scales = [on.normal(n, s.r, dtype=single) for n in parts], [2.0] * len(parts)
    return Work(lambda: extend(e, downs, ups, scales, N, K), [*downs, *ups], [e[:N, K:], e[N:, :K]])


def layer_weights(s: Sizes, on: Device, projections: Sequence[tuple[Sequence[int], int]]) -> Work:
    """All of a layer's projections at once: the outputs of each one's stacked layers, and its inputs."""
    from whet.kernels.layer_weights import LayerWeights, ProjectionWeight, layer_weights

    found, reads, single = [], [], torch.float32
    for parts, K in projections:
        weight, read = nf4_weight(on, sum(parts), K)
        downs = [on.normal(s.r, K, dtype=single) for _ in parts]
        ups = [on.normal(n, s.r, dtype=single) for n in parts]
        found.append(ProjectionWeight(weight, downs, ups, [2.0] * len(parts), s.R))
        reads += [*read, *downs, *ups]
    layer = LayerWeights(found, on.dtype)
    written = unallocated(on.empty(layer.size))
    return Work(lambda: layer_weights(layer), reads, [written])


# ------------------------------------------------------------------ products in FP8


def quantize_rows(s: Sizes, on: Device, T: int, K: int) -> Work:
    from whet.kernels.fp8 import E4M3, quantize_rows

    x, out = on.normal(T, K + s.R)[:, :K], on.empty(T, K, dtype=E4M3)
    return Work(lambda: quantize_rows(x, out), [x], [out, unallocated(on.empty(T, 1, dtype=torch.float32))])


def scaled_mm(s: Sizes, on: Device, T: int, N: int, K: int) -> Work:
    from whet.kernels.fp8 import quantize_rows, scaled_mm

    x, w = (quantize_rows(on.normal(rows, K)) for rows in (T, N))
    out = on.empty(T, N)
    return Work(lambda: scaled_mm(*x, *w, on.dtype, out), [*x, *w], [out], 2 * T * N * K, fp8=True)


# ------------------------------------------------------------------ the loss


def statistics(on: Device, rows: int) -> list[Tensor]:
    return [on.empty(rows, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bool)]


def log_probs_of_logits(s: Sizes, on: Device) -> Work:
    from whet.kernels import cross_entropy

    cuda = on.name == "cuda"
    fold = cross_entropy.log_probs_of_logits_triton if cuda else cross_entropy.log_probs_of_logits_reference
    first = on.normal(s.chunk, s.V, std=2.0)
    logits, labels = first.clone(), torch.randint(s.V, (s.chunk,), device=on.name)
    out = statistics(on, s.chunk)
    run = partial(fold, logits, labels, cross_entropy.LogProbs(*out, None))
    return Work(run, [logits, labels], [logits, *out], restore=lambda: logits.copy_(first))


def linear_log_probs(s: Sizes, on: Device) -> Work:
    from whet.kernels.cross_entropy import linear_log_probs

    h, weight = on.normal(s.head_rows, s.D), on.normal(s.V, s.D, std=s.D**-0.5)
    labels, dh = torch.randint(s.V, (s.head_rows,), device=on.name), on.empty(s.head_rows, s.D)
    return Work(
        lambda: linear_log_probs(h, weight, labels, out=dh),
        [h, weight, labels],
        [*map(unallocated, statistics(on, s.head_rows)), dh],
        2 * 2 * s.head_rows * s.V * s.D,
    )


def logits_gradient(s: Sizes, on: Device) -> Work:
    from whet.kernels import cross_entropy

    cuda = on.name == "cuda"
    differentiate = cross_entropy.logits_gradient_triton if cuda else cross_entropy.logits_gradient_reference
    first = on.normal(s.chunk, s.V, std=2.0)
    logits, labels = first.clone(), torch.randint(s.V, (s.chunk,), device=on.name)
    lse, upstream = (torch.ones(s.chunk, device=on.name) for _ in range(2))
    run = partial(differentiate, logits, labels, lse, upstream, 0)
    return Work(run, [logits, labels, lse, upstream], [logits], restore=lambda: logits.copy_(first))


def linear_log_probs_weight_grad(s: Sizes, on: Device) -> Work:
    from whet.kernels.cross_entropy import linear_log_probs_weight_grad

    h, weight = on.normal(s.head_rows, s.D), on.normal(s.V, s.D, std=s.D**-0.5)
    labels = torch.randint(s.V, (s.head_rows,), device=on.name)
    lse, upstream = (torch.ones(s.head_rows, device=on.name) for _ in range(2))
    return Work(
        lambda: linear_log_probs_weight_grad(h, weight, labels, lse, upstream),
        [h, weight, labels, lse, upstream],
        [unallocated(weight)],
        2 * 2 * s.head_rows * s.V * s.D,
    )


# ------------------------------------------------------------------ the optimizer


def stochastic_round(s: Sizes, on: Device) -> Work:
    """Of one weight, after a step in fp32."""
    from whet.kernels.stochastic_round import stochastic_round

    x, out = on.normal(s.F * s.D, dtype=torch.float32), on.empty(s.F * s.D, dtype=torch.bfloat16)
    return Work(lambda: stochastic_round(x, out, 0, seed=3407, step=1), [x], [out])


# ------------------------------------------------------------------ LoRA's own products (cuBLAS)


def into_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, as models/projection.py has it."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def lora_xa(s: Sizes, on: Device, T: int, K: int) -> Work:
    """x A^T into the margin behind x."""
    xe, down = on.normal(T, K + s.R), on.normal(s.R, K + s.R)[:, :K]
    x, out = xe[:, :K], xe[:, K:]
    return Work(lambda: torch.mm(x, down.T, out=out), [x, down], [out], 2 * T * K * s.R)


def lora_dyb(s: Sizes, on: Device, T: int, N: int) -> Work:
    """dY (s B) into the margin behind dY."""
    dye, up = on.normal(T, N + s.R), on.normal(N, s.D + s.R)[:, s.D :]
    dy, out = dye[:, :N], dye[:, N:]
    return Work(lambda: torch.mm(dy, up, out=out), [dy, up], [out], 2 * T * N * s.R)


def lora_db(s: Sizes, on: Device, T: int, N: int, rank: int) -> Work:
    """dB = dY^T (x A^T), in fp32."""
    dy, xa = on.normal(T, N + s.R)[:, :N], on.normal(T, s.D + s.R)[:, s.D : s.D + rank]
    out = unallocated(on.empty(N, rank, dtype=torch.float32))
    return Work(lambda: into_fp32(dy.T, xa), [dy, xa], [out], 2 * T * N * rank)


def lora_da(s: Sizes, on: Device, T: int, K: int, rank: int) -> Work:
    """dA = (dY s B)^T x, in fp32."""
    g, x = on.normal(T, s.D + s.R)[:, s.D : s.D + rank], on.normal(T, K + s.R)[:, :K]
    out = unallocated(on.empty(rank, K, dtype=torch.float32))
    return Work(lambda: into_fp32(g.T, x), [g, x], [out], 2 * T * K * rank)


# ------------------------------------------------------------------ what is measured


def cases(s: Sizes, tokens: Sequence[int], on: Device) -> list[Case]:
    """All of them; no tensor is made before a case's `make`."""
    found: list[Case] = []

    def add(kernel: Callable[..., Work], shape: str, T: int | None, *given: Any) -> None:
        found.append(Case(kernel.__name__, shape, T, partial(kernel, s, on, *given)))

    q, kv = s.H * s.d, s.G * s.d
    for N, K in ((s.F, s.D), (s.D, q), (s.W, s.D), (s.D, s.F)):
        add(dequantize_nf4, f"{N}x{K}", None, N, K)
        for transposed in (False, True):
            add(dequantize_nf4_fp8, f"{N}x{K}" + ", transposed" * transposed, None, N, K, transposed)
    projections = {
        "qkv": ((q, kv, kv), s.D),
        "o": ((s.D,), q),
        "gate, up": ((s.F,) * 2, s.D),
        "down": ((s.D,), s.F),
    }
    for name, (parts, K) in projections.items():
        add(extend, f"{name}: {sum(parts)}x{K}", None, parts, K)
    add(layer_weights, "qkv, o, gate and up, down", None, list(projections.values()))
    for T in tokens:
        for norm in (rms_norm, rms_norm_backward):
            add(norm, f"D={s.D}", T, T)
        for rotation in (rope, rope_backward):
            add(rotation, f"{s.H}+2x{s.G} heads of {s.d}", T, T)
        for activation in (glu, glu_backward):
            add(activation, f"F={s.F}", T, T)
        mixed = mixed_lengths(T, s.row)
        for lengths, name in (
            ([s.row] * (T // s.row), f"{T // s.row}x{s.row}"),
            (mixed, f"{len(mixed)} documents of up to {max(mixed)}"),
        ):
            for kernel in (attention, attention_backward, flash, flash_backward):
                add(kernel, name + (", soft cap" if kernel in (flash, flash_backward) else ""), T, lengths)
        for K in (s.D, s.W, s.F, 2 * s.F):
            add(quantize_rows, f"K={K}", T, T, K)
        for N, K in ((2 * s.F, s.D), (s.D, 2 * s.F), (s.D, s.F)):
            add(scaled_mm, f"N={N}, K={K}", T, T, N, K)
        for K in (s.D, s.F):
            add(lora_xa, f"K={K}, R={s.R}", T, T, K)
        for N in (s.D, s.W, 2 * s.F):
            add(lora_dyb, f"N={N}, R={s.R}", T, T, N)
        for N, rank in ((s.D, s.r), (s.W, 3 * s.r), (2 * s.F, 2 * s.r)):
            add(lora_db, f"N={N}, r={rank}", T, T, N, rank)
        for K, rank in ((s.D, 3 * s.r), (s.F, s.r)):
            add(lora_da, f"K={K}, r={rank}", T, T, K, rank)
    add(log_probs_of_logits, f"V={s.V}", s.chunk)
    add(linear_log_probs, f"D={s.D}, V={s.V}", s.head_rows)
    add(logits_gradient, f"V={s.V}", s.chunk)
    add(stochastic_round, f"{s.F}x{s.D}", None)
    add(linear_log_probs_weight_grad, f"D={s.D}, V={s.V}", s.head_rows)
    return found


@dataclass(frozen=True)
class Ceilings:
    """Rates. gemm: of one by itself; sustained: of many in a row; fp8: of one by itself, 0 where it is not known."""

    copy_tb_s: float
    gemm_tflop_s: float
    sustained_tflop_s: float
    fp8_tflop_s: float = 0.0

    def gemm_for(self, work: Work, us: float) -> float:
        """What the products of a work that took so long could run at."""
        if work.fp8:
            return self.fp8_tflop_s
        return self.gemm_tflop_s if us <= LONG_US else min(self.gemm_tflop_s, self.sustained_tflop_s)


def bound_us(moved: int, flops: int, copy_tb_s: float, gemm_tflop_s: float) -> float:
    return max(moved / copy_tb_s, flops / gemm_tflop_s if flops else 0.0) / 1e6


# ------------------------------------------------------------------ timing


def one_by_one(work: Work, scratch: Tensor) -> float:
    """Median microseconds. What goes before a call sweeps L2, and keeps the GPU busy while the call is launched."""

    def before() -> None:
        if work.restore is not None:
            work.restore()
        for _ in range(2):  # the second one for the host alone: some calls launch several kernels
            scratch.neg_()

    before()
    work.run()  # compiles
    times = _times(work.run, before, 3)
    calls = min(max(int(TIMED_US / median(times)), 5), 50)
    return median(_times(work.run, before, calls))


def _times(run: Callable[[], object], before: Callable[[], object], calls: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in events:
        before()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def replayed(works: Sequence[Work], estimate_us: float) -> float:
    """Median over replays of the mean microseconds a call, the works taken in turn."""
    rounds = max(1, round(REPLAYED_US / estimate_us / len(works)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for work in works:
            work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for work in works:
                work.run()
    graph.replay()
    times = _times(graph.replay, lambda: None, REPLAYS)
    return median(times) / (rounds * len(works))


def sets(work: Work, l2_bytes: int) -> int:
    """How many sets of a work's tensors to take in turn. Those changed in place are counted twice, which is as well."""
    return min(MOST_SETS, max(1, -(-2 * L2_TIMES * l2_bytes // work.bytes)))


def measure(case: Case, scratch: Tensor) -> tuple[Work, float, str]:
    """The work, median microseconds, and how they were taken."""
    work = case.make()
    us = one_by_one(work, scratch)
    # Attention's back ends keep random state, which a graph would have to hold for them.
    if us >= SHORT_US or work.restore is not None or case.kernel.startswith("attention"):
        return work, us, "one by one"
    others = [case.make() for _ in range(sets(work, l2_bytes()) - 1)]
    return work, replayed([work, *others], us), "replayed"


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def ceilings(on: Device, scratch: Tensor) -> Ceilings:
    """Of a copy of 1 GiB, read and written, and of GEMMs of 4096x4096x14336."""
    source = on.normal(2**29)
    target = torch.empty_like(source)
    copy = Work(lambda: target.copy_(source), [source], [target])
    copy_us = one_by_one(copy, scratch)
    m, k, n = 4096, 4096, 14336
    a, b, c = on.normal(m, k), on.normal(n, k), on.empty(m, n)
    gemm = Work(lambda: torch.mm(a, b.T, out=c), [a, b], [c], 2 * m * k * n)
    gemm_us = one_by_one(gemm, scratch)
    many = max(1, round(SUSTAINED_US / gemm_us))
    sustained_us = one_by_one(replace(gemm, run=lambda: [gemm.run() for _ in range(many)]), scratch) / many
    limits = Ceilings(copy.bytes / copy_us / 1e6, gemm.flops / gemm_us / 1e6, gemm.flops / sustained_us / 1e6)
    from whet.kernels.fp8 import E4M3, supported

    if not supported(a.device):
        return limits
    a8, b8, one = a.to(E4M3), b.to(E4M3), torch.ones((), device=on.name)

    def product() -> Tensor:
        return torch._scaled_mm(a8, b8.t(), one, one, out_dtype=on.dtype, use_fast_accum=True, out=c)

    fp8 = Work(product, [a8, b8], [c], gemm.flops, fp8=True)
    return replace(limits, fp8_tflop_s=fp8.flops / one_by_one(fp8, scratch) / 1e6)


def result(case: Case, limits: Ceilings, scratch: Tensor) -> dict[str, Any]:
    """The fields of a line that this case has of its own."""
    line: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "tokens": case.tokens}
    line |= dict.fromkeys(("bytes", "flops", "bound_us", "measured_us", "ratio", "timing", "error"))
    line |= {"copy_tb_s": round(limits.copy_tb_s, 3), "gemm_tflop_s": round(limits.gemm_tflop_s, 1)}
    try:
        work, us, line["timing"] = measure(case, scratch)
    except Exception as error:  # whatever it is, the other kernels are still measured
        return line | {"error": f"{type(error).__name__}: {error}"[:500]}
    gemm = limits.gemm_for(work, us)
    bound = bound_us(work.bytes, work.flops, limits.copy_tb_s, gemm)
    return line | {
        "bytes": work.bytes,
        "flops": work.flops,
        "bound_us": round(bound, 3),
        "measured_us": round(us, 3),
        "ratio": round(us / bound, 3),
        "gemm_tflop_s": round(gemm, 1),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    row = Sizes().row
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384], help=f"multiples of {row}")
    names = sorted({case.kernel for case in cases(Sizes(), [row], Device())})
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--run-id", default=None)
    parser.add_argument("--out", type=Path, default=None, help="a .jsonl file to append the lines to")
    args = parser.parse_args(argv)
    if any(tokens < row or tokens % row for tokens in args.tokens):
        parser.error(f"--tokens must be multiples of {row}, the length of a row")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if not torch.cuda.is_available():
        print("bench/kernel_speed.py measures kernels on a GPU, and torch finds no CUDA device here", file=sys.stderr)
        return 2
    from environment import origin
    from table import render

    on, where = Device(), origin()
    scratch = on.normal(max(2**27, 2 * l2_bytes()))
    started = time.perf_counter()
    limits = ceilings(on, scratch)
    said = ", ".join(f"{name} {value:.4g}" for name, value in asdict(limits).items())
    print(f"{said}; {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    lines = []
    for case in cases(Sizes(), args.tokens, on):
        if case.kernel not in args.only:
            continue
        torch.cuda.empty_cache()
        line = {"kind": "kernels", "run_id": args.run_id, **result(case, limits, scratch), **where}
        lines.append(line)
        said = line["error"] or f"{line['measured_us']} us, {line['ratio']} of the bound"
        said += f"; {time.perf_counter() - started:.1f} s"
        print(f"{case.kernel} {case.shape} {case.tokens or ''}: {said}", file=sys.stderr, flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print(render(lines))
    return 1 if any(line["error"] for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
