"""The gated activation's backward, and in the same pass those gradients of adapters that read what it makes.

    dgate, dup  as in kernels/glu.py; act = f(gate) * up is computed again and never stored
    dA_down = g^T act        dB_gate = s dgate^T tail_gate        dB_up = s dup^T tail_up

g is the gradient of down's adapter between A and B, tail_x = x A^T of gate's and up's. By itself each of these products
reads again, from memory, as many values as the activation has just written; here they are multiplied on the way out.
Products are of values rounded to gate_up's dtype, summed in fp32: within a program over its rows, then over programs in
a fixed order.
Shapes: gate_up [T, 2F], gate first; dact [T, F]; g, tails [T, r], each of its own rank r; dA_down [r, F]; dB [F, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whet.kernels._precision import wide_dtype
from whet.kernels._triton import fused, jit, tl, triton
from whet.kernels.glu import _f_and_derivative, glu_backward_reference

MOST_RANKS = 128  # of all three together: sums that a program holds in registers
BLOCK_T, BLOCK_F, WARPS, STAGES = 32, 64, 4, 3  # of 20 measured, some twice as slow
ROWS = 512  # at most, of a program: its sums are written once
SUM_COLUMNS = 64


class Sum(NamedTuple):
    """Where a gradient goes: `total` [.., ..] in fp32, contiguous, is scale times the product, added to if `add`."""

    total: Tensor
    scale: float = 1.0
    add: bool = False


class Factors(NamedTuple):
    """What the gradients of down, gate and up are multiplied with: rows of any stride."""

    g_TR: Tensor
    gate_TR: Tensor
    up_TR: Tensor


def glu_backward_lora_reference(
    dact_TF: Tensor, gate_up_T2F: Tensor, activation: str, factors: Factors, sums: tuple[Sum, Sum, Sum], out: Tensor
) -> Tensor:
    """`glu_backward_lora` in torch."""
    act = torch.empty_like(dact_TF)
    glu_backward_reference(dact_TF, gate_up_T2F, activation, act=act, out=out)
    dgate, dup = out.chunk(2, dim=-1)
    g, gate, up = (x.to(wide_dtype(x.dtype)) for x in factors)
    down, *rest = sums
    _put(g.T @ act.to(g.dtype), down)
    for dy, tail, total in zip((dgate, dup), (gate, up), rest, strict=True):
        _put(dy.to(tail.dtype).T @ tail, total)
    return out


def _put(product: Tensor, sum_: Sum) -> None:
    if sum_.add:
        sum_.total.add_(product, alpha=sum_.scale)
    else:
        torch.mul(product, sum_.scale, out=sum_.total)


@jit
def _glu_backward_lora_kernel(
    dact, gate_up, out, g, gate_tail, up_tail, partials,
    dact_stride, gate_up_stride, out_stride, g_stride, gate_stride, up_stride, T, F, rows,
    ACTIVATION: tl.constexpr, r_down: tl.constexpr, r_gate: tl.constexpr, r_up: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns of `rows` tokens, each read before it is written: out may be gate_up.

    The three products share one sum [R, BLOCK_F]: down's rows come first, then gate's, then up's, and each factor is
    zero where another's rows are. Ranks are constants, so that a factor's row is read at once, not value by value.
    """
    column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    first = tl.program_id(1) * rows
    c = tl.arange(0, R)[None, :]
    total = tl.zeros((R, BLOCK_F), tl.float32)
    for start in range(first, min(first + rows, T), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = (t < T)[:, None]
        row = t.to(tl.int64)[:, None]
        mask = there & (column < F)[None, :]
        place = gate_up + row * gate_up_stride + column[None, :]
        z = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(place + F, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dact + row * dact_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        of_down = tl.load(g + row * g_stride + c, mask=there & (c < r_down), other=0.0)
        i = c - r_down
        of_gate = tl.load(gate_tail + row * gate_stride + i, mask=there & (i >= 0) & (i < r_gate), other=0.0)
        i -= r_gate
        of_up = tl.load(up_tail + row * up_stride + i, mask=there & (i >= 0) & (i < r_up), other=0.0)
        f, df = _f_and_derivative(z, ACTIVATION)
        act = (f * u).to(out.dtype.element_ty)
        dgate = (d * u * df).to(out.dtype.element_ty)
        dup = (d * f).to(out.dtype.element_ty)
        there_out = out + row * out_stride + column[None, :]
        tl.store(there_out, dgate, mask=mask)
        tl.store(there_out + F, dup, mask=mask)
        total = tl.dot(tl.trans(of_down), act, total, input_precision="ieee")
        total = tl.dot(tl.trans(of_gate), dgate, total, input_precision="ieee")
        total = tl.dot(tl.trans(of_up), dup, total, input_precision="ieee")
    j = tl.arange(0, R)[:, None]
    ranks = r_down + r_gate + r_up
    place = partials + (tl.program_id(1).to(tl.int64) * ranks + j) * F + column[None, :]
    tl.store(place, total, mask=(j < ranks) & (column < F)[None, :])


@jit
def _sum_partials_kernel(
    partials, down, gate, up, s_down, s_gate, s_up, add_down, add_gate, add_up, r_down, r_gate, r_up, F, splits,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of dA_down, dB_gate^T and dB_up^T."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    j = tl.arange(0, R)[:, None]
    ranks = r_down + r_gate + r_up
    total = tl.zeros((R, BLOCK), tl.float32)
    mask = (j < ranks) & (i < F)
    for split in range(splits):
        total += tl.load(partials + (tl.cast(split, tl.int64) * ranks + j) * F + i, mask=mask, other=0.0)
    of = (j < r_down) & mask
    old = tl.load(down + j * F + i, mask=of & (add_down != 0), other=0.0)
    tl.store(down + j * F + i, old + s_down * total, mask=of)
    k = j - r_down
    of = (k >= 0) & (k < r_gate) & mask
    old = tl.load(gate + i * r_gate + k, mask=of & (add_gate != 0), other=0.0)
    tl.store(gate + i * r_gate + k, old + s_gate * total, mask=of)
    k -= r_gate
    of = (k >= 0) & (k < r_up) & mask
    old = tl.load(up + i * r_up + k, mask=of & (add_up != 0), other=0.0)
    tl.store(up + i * r_up + k, old + s_up * total, mask=of)


def glu_backward_lora_triton(
    dact_TF: Tensor, gate_up_T2F: Tensor, activation: str, factors: Factors, sums: tuple[Sum, Sum, Sum], out: Tensor
) -> Tensor:
    """`glu_backward_lora` in two launches."""
    T, F = dact_TF.shape
    ranks = [x.shape[1] for x in factors]
    R = max(64, triton.next_power_of_2(sum(ranks)))  # a matrix instruction has 64 rows
    splits = max(1, triton.cdiv(T, ROWS))
    rows = triton.cdiv(triton.cdiv(T, splits), BLOCK_T) * BLOCK_T
    partials = torch.empty(splits, sum(ranks), F, device=out.device, dtype=torch.float32)
    _glu_backward_lora_kernel[(triton.cdiv(F, BLOCK_F), splits)](
        dact_TF, gate_up_T2F, out, *factors, partials,
        dact_TF.stride(0), gate_up_T2F.stride(0), out.stride(0), *(x.stride(0) for x in factors), T, F, rows,
        ACTIVATION=activation, r_down=ranks[0], r_gate=ranks[1], r_up=ranks[2], R=R,
        BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    _sum_partials_kernel[(triton.cdiv(F, SUM_COLUMNS),)](
        partials, *(s.total for s in sums), *(s.scale for s in sums), *(int(s.add) for s in sums), *ranks, F, splits,
        R=R, BLOCK=SUM_COLUMNS, num_warps=8,
    )  # fmt: skip
    return out


def takes(gate_up_T2F: Tensor, ranks: Sequence[int]) -> bool:
    """Whether this pays here: on a GPU with Triton, where the sums fit in registers. Elsewhere products go apart."""
    return fused(gate_up_T2F) and sum(ranks) <= MOST_RANKS


def glu_backward_lora(
    dact_TF: Tensor,
    gate_up_T2F: Tensor,
    activation: str,
    factors: Factors,
    sums: tuple[Sum, Sum, Sum],
    *,
    out: Tensor,
) -> Tensor:
    """The gradient of gate_up into `out` [T, 2F]: any row stride, and it may be `gate_up`. Adapters' into `sums`.

    These are dA_down, dB_gate and dB_up. ValueError: shapes or strides.
    """
    T, F = dact_TF.shape
    _check((dact_TF, (T, F)), (gate_up_T2F, (T, 2 * F)), (out, (T, 2 * F)), *((x, (T, x.shape[1])) for x in factors))
    shapes = [(factors.g_TR.shape[1], F), (F, factors.gate_TR.shape[1]), (F, factors.up_TR.shape[1])]
    for (total, *_), shape in zip(sums, shapes, strict=True):
        if total.shape != shape or not total.is_contiguous():
            raise ValueError(f"a sum is {tuple(total.shape)}; it must be {shape}, contiguous")
    taken = takes(gate_up_T2F, [x.shape[1] for x in factors])
    run = glu_backward_lora_triton if taken else glu_backward_lora_reference
    return run(dact_TF, gate_up_T2F, activation, factors, sums, out)


def _check(*given: tuple[Tensor, tuple[int, int]]) -> None:
    """The kernels go by these shapes, whatever the tensors have."""
    for x, shape in given:
        if x.shape != shape or x.stride(-1) != 1:
            raise ValueError(f"{tuple(x.shape)} with strides {x.stride()}; it must be {shape}, rows of adjacent values")
