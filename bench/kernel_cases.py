"""What kernel_speed.py measures: each kernel of src/whet/kernels at the 8B shape, with what it must read and write.

A kernel is imported where it is used: one that cannot be imported fails alone.

Attention's are in attention_cases.py; shapes: see kernel_work.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from attention_cases import (
    attention,
    attention_backward,
    flash,
    flash4,
    flash4_backward,
    flash_backward,
    mixed_lengths,
    needs_flash4,
)
from kernel_work import Case, Device, Missing, Sizes, Work, unallocated
from torch import Tensor

EPS = 1e-5


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


def glu_backward_lora(s: Sizes, on: Device, T: int) -> Work:
    """What training runs where gate, up and down have adapters; their sums are read and written, as from the second
    pass of a step on."""
    from whet.kernels.glu_lora import Factors, Sum, glu_backward_lora

    dact, gate_up, out = on.normal(T, s.F), on.normal(T, 2 * s.F), on.empty(T, 2 * s.F + s.R)[:, : 2 * s.F]
    factors = Factors(*(on.normal(T, s.R)[:, : s.r] for _ in range(3)))
    totals = [on.normal(*shape, dtype=torch.float32) for shape in ((s.r, s.F), (s.F, s.r), (s.F, s.r))]
    sums = tuple(Sum(total, 2.0, add=True) for total in totals)
    run = partial(glu_backward_lora, dact, gate_up, "silu", factors, sums, out=out)
    return Work(run, [dact, gate_up, *factors, *totals], [out, *totals], 3 * 2 * T * s.F * s.r)


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


# ------------------------------------------------------------------ products


def quantize_rows(s: Sizes, on: Device, T: int, K: int) -> Work:
    from whet.kernels.fp8 import E4M3, quantize_rows

    x, out = on.normal(T, K + s.R)[:, :K], on.empty(T, K, dtype=E4M3)
    return Work(lambda: quantize_rows(x, out), [x], [out, unallocated(on.empty(T, 1, dtype=torch.float32))])


def scaled_mm(s: Sizes, on: Device, T: int, N: int, K: int) -> Work:
    from whet.kernels.fp8 import quantize_rows, scaled_mm

    x, w = (quantize_rows(on.normal(rows, K)) for rows in (T, N))
    out = on.empty(T, N)
    return Work(lambda: scaled_mm(*x, *w, on.dtype, out), [*x, *w], [out], 2 * T * N * K, fp8=True)


def product(s: Sizes, on: Device, T: int, N: int, K: int, fp8: bool) -> Work:
    """x W^T + c by the heuristic's first algorithm, untuned. In 16 bits c lies apart; in FP8 it is what is written."""
    from whet.kernels.cublaslt import product
    from whet.kernels.fp8 import quantize_rows

    c, flops = on.normal(T, N), 2 * T * N * K
    if fp8:
        (x, x_scale), (w, w_scale) = (quantize_rows(on.normal(rows, K)) for rows in (T, N))
        run = partial(product, x, w.T, c=c, out=c, scale_a=x_scale, scale_b=w_scale)
        return Work(run, [x, x_scale, w, w_scale, c], [c], flops, fp8=True)
    x, w, out = on.normal(T, K), on.normal(N, K), on.empty(T, N)
    return Work(partial(product, x, w.T, c=c, out=out), [x, w, c], [out], flops)


def needs_fp8(on: Device) -> None:
    """Elsewhere references run, which are no kernels."""
    from whet.kernels.fp8 import supported

    if not supported(torch.device(on.name)):
        raise Missing("FP8 products with a scale a row need NVIDIA's Hopper or later")


def needs_cublaslt(on: Device, dtype: torch.dtype) -> None:
    """Elsewhere torch multiplies, and adds apart."""
    from whet.kernels.cublaslt import available

    if not available(torch.device(on.name), dtype):
        raise Missing(f"cuBLASLt does not multiply {dtype} here")


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


def adamw_8bit(s: Sizes, on: Device, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> Work:
    """A step of all parameters; shapes: count, rows and columns. Weights in bf16 are rounded at random.

    Read: weights, gradients, 8-bit moments and their scales, and the maps; written: all but gradients and maps. The
    table of addresses, which the host goes through at every call, is not counted.
    """
    from bitsandbytes.functional import create_dynamic_map

    from whet.kernels.adamw_8bit import CodeMap, Entry, Tables, Update, adamw_8bit
    from whet.kernels.stochastic_round import BLOCK

    maps = CodeMap.of(create_dynamic_map(True).to(on.name)), CodeMap.of(create_dynamic_map(False).to(on.name))
    entries: list[Entry] = []
    first = 0
    for count, *shape in shapes:
        blocks = -(-math.prod(shape) // BLOCK)
        for _ in range(count):
            weight, grad = (on.normal(*shape, std=std, dtype=dtype) for std in (0.02, 1e-3))
            moments = on.random_bytes(*shape), on.random_bytes(*shape)
            scales = (on.empty(blocks, dtype=torch.float32).fill_(largest) for largest in (3e-3, 1e-5))
            entries.append(Entry(weight, grad, *moments, *scales, first))
            first += blocks
    update = Update(step=100, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, seed=3407)
    changed = [x for e in entries for x in (e.weight, e.moment1, e.moment2, e.scale1, e.scale2) if x is not None]
    reads = [*changed, *(e.grad for e in entries), *(x for one in maps for x in (one.numbers, one.middles, one.cells))]
    return Work(partial(adamw_8bit, entries, maps, update, Tables()), reads, changed, host_bound=True)


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

    def add(
        kernel: Callable[..., Work], shape: str, T: int | None, *given: Any, needs: Callable[[], None] = lambda: None
    ) -> None:
        found.append(Case(kernel.__name__, shape, T, partial(kernel, s, on, *given), needs))

    fp8 = partial(needs_fp8, on)
    for N, K in ((s.F, s.D), (s.D, s.H * s.d), (s.W, s.D), (s.D, s.F)):
        add(dequantize_nf4, f"{N}x{K}", None, N, K)
        for transposed in (False, True):
            add(dequantize_nf4_fp8, f"{N}x{K}" + ", transposed" * transposed, None, N, K, transposed, needs=fp8)
    for name, (parts, K) in s.projections.items():
        add(extend, f"{name}: {sum(parts)}x{K}", None, parts, K)
    add(layer_weights, "qkv, o, gate and up, down", None, list(s.projections.values()))
    for T in tokens:
        for norm in (rms_norm, rms_norm_backward):
            add(norm, f"D={s.D}", T, T)
        for rotation in (rope, rope_backward):
            add(rotation, f"{s.H}+2x{s.G} heads of {s.d}", T, T)
        for activation in (glu, glu_backward, glu_backward_lora):
            add(activation, f"F={s.F}", T, T)
        mixed = mixed_lengths(T, s.row)
        for lengths, name in (
            ([s.row] * (T // s.row), f"{T // s.row}x{s.row}"),
            (mixed, f"{len(mixed)} documents of up to {max(mixed)}"),
        ):
            for kernel in (attention, attention_backward):
                add(kernel, name, T, lengths)
            for kernel in (flash4, flash4_backward):
                add(kernel, name, T, lengths, needs=partial(needs_flash4, on))
            for kernel in (flash, flash_backward):
                add(kernel, name + ", soft cap", T, lengths)
        for K in (s.D, s.W, s.F, 2 * s.F):
            add(quantize_rows, f"K={K}", T, T, K, needs=fp8)
        for N, K in ((2 * s.F, s.D), (s.D, 2 * s.F), (s.D, s.F)):
            add(scaled_mm, f"N={N}, K={K}", T, T, N, K, needs=fp8)
        N, K = s.D, s.F + s.R
        by_cublaslt = partial(needs_cublaslt, on)
        add(product, f"16 bits, c apart: N={N}, K={K}", T, T, N, K, False, needs=partial(by_cublaslt, on.dtype))
        N, K = 2 * s.F, s.D
        e4m3 = partial(by_cublaslt, torch.float8_e4m3fn)
        add(product, f"FP8, c in place: N={N}, K={K}", T, T, N, K, True, needs=e4m3)
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
    weights = ", ".join(f"{count} of {rows}x{columns}" for count, rows, columns in s.trained)
    add(adamw_8bit, f"bf16: {weights}", None, s.trained, torch.bfloat16)
    adapters = f"fp32: {sum(count for count, *_ in s.adapters)} adapters, r={s.r}"
    add(adamw_8bit, adapters, None, s.adapters, torch.float32)
    add(linear_log_probs_weight_grad, f"D={s.D}, V={s.V}", s.head_rows)
    return found
