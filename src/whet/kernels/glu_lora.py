"""The gated activation, forward and backward, and in the same pass those products with adapters that read it.

    act = f(gate) * up       tail = act A^T                                    forward
    dA_down = g^T act        dB_gate = s dgate^T tail_gate        dB_up = s dup^T tail_up

dgate and dup are as in kernels/glu.py; the backward computes act again and never stores it. A is down's, g the gradient
of its adapter between A and B, tail_x = x A^T of gate's and up's. By itself each of these products reads again, from
memory, as many values as the activation has just written; here they are multiplied on the way out. Products are of
values rounded to gate_up's dtype, summed in fp32: within a program, then over programs in a fixed order.
Shapes: gate_up [T, 2F], gate first; act, dact [T, F]; A, tail [R, F], [T, R], R columns of margin; g, tail_x [T, r],
each of its own rank r; dA_down [r, F]; dB [F, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whet.kernels._precision import wide_dtype
from whet.kernels._triton import fused, jit, tl, triton
from whet.kernels.glu import _f_and_derivative, glu_backward_reference, glu_reference

MOST_RANKS = 128  # of all three together: sums that a program holds in registers
BLOCK_T, BLOCK_F, WARPS, STAGES = 32, 64, 4, 3  # of 20 measured, some twice as slow
ROWS = 512  # at most, of a program: its sums are written once
SUM_COLUMNS = 64
FORWARD_T, FORWARD_F, FORWARD_STAGES = 64, 64, 2
PROGRAMS = 512  # about as many of the forward, whatever T


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


def glu_lora_reference(gate_up_T2F: Tensor, activation: str, down_RF: Tensor, out: Tensor, tail: Tensor) -> Tensor:
    """`glu_lora` in torch."""
    glu_reference(gate_up_T2F, activation, out)
    tail.copy_(out.to(wide_dtype(out.dtype)) @ down_RF.to(wide_dtype(out.dtype)).T)
    return out


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
def _glu_lora_kernel(
    gate_up, out, down, partials, gate_up_stride, out_stride, down_stride, T, F, blocks,
    ACTIVATION: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens, and `blocks` times BLOCK_F columns."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, there = t.to(tl.int64)[:, None], (t < T)[:, None]
    group = tl.program_id(1)
    j = tl.arange(0, R)[:, None]
    tail = tl.zeros((R, BLOCK_T), tl.float32)
    for block in range(blocks):
        column = (group * blocks + block) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
        inside = column < F
        place = gate_up + row * gate_up_stride + column
        z = tl.load(place, mask=there & inside, other=0.0).to(tl.float32)
        u = tl.load(place + F, mask=there & inside, other=0.0).to(tl.float32)
        a = tl.load(down + j * down_stride + column, mask=inside, other=0.0)
        f, _ = _f_and_derivative(z, ACTIVATION)
        act = (f * u).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, act, mask=there & inside)
        tail = tl.dot(a, tl.trans(act), tail, input_precision="ieee")
    tl.store(partials + (group.to(tl.int64) * R + j) * T + t[None, :], tail, mask=(t < T)[None, :])


@jit
def _sum_tails_kernel(partials, tail, tail_stride, T, groups, R: tl.constexpr, BLOCK_T: tl.constexpr):
    """One program: BLOCK_T tokens' tails."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    j = tl.arange(0, R)[:, None]
    total = tl.zeros((R, BLOCK_T), tl.float32)
    for group in range(groups):
        total += tl.load(partials + (tl.cast(group, tl.int64) * R + j) * T + t, mask=t < T, other=0.0)
    tl.store(tail + t.to(tl.int64) * tail_stride + j, total.to(tail.dtype.element_ty), mask=t < T)


@jit
def _glu_backward_lora_kernel(
    dact, gate_up, out, g, gate_tail, up_tail, partials,
    dact_stride, gate_up_stride, out_stride, g_stride, gate_stride, up_stride, T, F, r_down, r_gate, r_up, rows,
    ACTIVATION: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F columns of `rows` tokens, each read before it is written: out may be gate_up.

    The three products share one sum [R, BLOCK_F]: down's rows come first, then gate's, then up's, and each factor is
    zero where another's rows are.
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


def glu_lora_triton(gate_up_T2F: Tensor, activation: str, down_RF: Tensor, out: Tensor, tail: Tensor) -> Tensor:
    """`glu_lora` in two launches. R must be a power of two here."""
    T, F, R = out.shape[0], out.shape[1], down_RF.shape[0]
    if T == 0:
        return out
    tiles, columns = triton.cdiv(T, FORWARD_T), triton.cdiv(F, FORWARD_F)
    blocks = triton.cdiv(columns, min(columns, triton.cdiv(PROGRAMS, tiles)))
    groups = triton.cdiv(columns, blocks)
    partials = torch.empty(groups, R, T, device=out.device, dtype=torch.float32)
    _glu_lora_kernel[(tiles, groups)](
        gate_up_T2F, out, down_RF, partials, gate_up_T2F.stride(0), out.stride(0), down_RF.stride(0), T, F, blocks,
        ACTIVATION=activation, R=R, BLOCK_T=FORWARD_T, BLOCK_F=FORWARD_F, num_warps=4, num_stages=FORWARD_STAGES,
    )  # fmt: skip
    _sum_tails_kernel[(triton.cdiv(T, 32),)](partials, tail, tail.stride(0), T, groups, R=R, BLOCK_T=32, num_warps=4)
    return out


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
        dact_TF.stride(0), gate_up_T2F.stride(0), out.stride(0), *(x.stride(0) for x in factors), T, F, *ranks, rows,
        ACTIVATION=activation, R=R, BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    _sum_partials_kernel[(triton.cdiv(F, SUM_COLUMNS),)](
        partials, *(s.total for s in sums), *(s.scale for s in sums), *(int(s.add) for s in sums), *ranks, F, splits,
        R=R, BLOCK=SUM_COLUMNS, num_warps=8,
    )  # fmt: skip
    return out


def takes(gate_up_T2F: Tensor, ranks: Sequence[int]) -> bool:
    """Whether this pays here: on a GPU with Triton, where the sums fit in registers. Elsewhere products go apart."""
    return fused(gate_up_T2F) and sum(ranks) <= MOST_RANKS


def takes_margin(gate_up_T2F: Tensor, R: int) -> bool:
    """The same of the forward."""
    return fused(gate_up_T2F) and R in (64, 128)


def glu_lora(gate_up_T2F: Tensor, activation: str, down_RF: Tensor, *, out: Tensor, tail: Tensor) -> Tensor:
    """f(gate) * up into `out` [T, F], and its product with A^T into `tail` [T, R]; any row strides.

    ValueError: shapes or strides.
    """
    T, F, R = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2, down_RF.shape[0]
    _check((gate_up_T2F, (T, 2 * F)), (down_RF, (R, F)), (out, (T, F)), (tail, (T, R)))
    run = glu_lora_triton if takes_margin(gate_up_T2F, R) else glu_lora_reference
    return run(gate_up_T2F, activation, down_RF, out, tail)


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
