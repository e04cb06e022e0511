"""RMSNorm over the last axis with a residual sum folded in, and its backward.

    y  = [residual +] x * rstd * (offset + w)          rstd = 1 / sqrt(mean(x^2) + eps)
    dx = [residual +] rstd * (g - xhat * mean(g * xhat))          g = dy * (offset + w), xhat = x * rstd
    dw = sum over tokens of dy * xhat

Everything in fp32, one rounding when a result is stored (fp64 on the reference path when x is fp64). x is fp32, bf16 or
fp16, the weight may be of another precision. offset is 1 for Gemma, whose weights are stored less one.
Source: Zhang & Sennrich 2019, arXiv:1910.07467.
Shapes: x, y, dy, residual [T, D]; w [D]; T tokens, D width. Rows may be strided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.kernels._precision import wide
from whet.kernels._triton import fused, jit, tl, triton

_BACKWARD_PROGRAMS = 528  # with a weight gradient: four for each of an H100's 132 SMs, and one partial sum each


def rms_norm_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """Not rounded: fp32 or fp64."""
    x = wide(x_TD)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight_D.to(x.dtype))
    return y if residual is None else residual.to(x.dtype) + y


def rms_norm_backward_reference(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx and dw, not rounded: fp32 or fp64."""
    x = wide(x_TD)
    dy = dy_TD.to(x.dtype)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    xhat = x * rstd
    g = dy * (offset + weight_D.to(x.dtype))
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + residual.to(x.dtype)
    return dx, (dy * xhat).sum(0)


@jit
def _rsqrt(x):
    """1 / sqrt(x): the device's fast one and a step of Newton's, six instructions, within a unit of the last place."""
    r = tl.rsqrt(x)
    return r + 0.5 * r * (1.0 - x * r * r)


@jit
def _add_both(a, b, c, d):
    return a + c, b + d


@jit
def _rms_norm_kernel(
    x, weight, residual, out, x_stride, residual_stride, out_stride, eps, offset,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, the row in registers: out may be x or residual."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < D
    u = tl.load(x + row * x_stride + c, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32) + offset
    if HAS_RESIDUAL:
        r = tl.load(residual + row * residual_stride + c, mask=mask, other=0.0).to(tl.float32)
    y = u * _rsqrt(tl.sum(u * u, axis=0) / D + eps) * w
    if HAS_RESIDUAL:
        y = r + y
    tl.store(out + row * out_stride + c, y.to(out.dtype.element_ty), mask=mask)


@jit
def _rms_norm_backward_kernel(
    dy, x, weight, residual, out, normed, partials,
    dy_stride, x_stride, residual_stride, out_stride, normed_stride, T, eps, offset,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WEIGHT_GRAD: tl.constexpr, NORMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; for a weight gradient several rows, whose sum goes to the program's row of partials."""
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    mask = c < D
    w = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32) + offset
    dw = tl.zeros((BLOCK,), tl.float32)
    for t in range(program, T, tl.num_programs(0)):
        row = tl.cast(t, tl.int64)
        u = tl.load(x + row * x_stride + c, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + row * dy_stride + c, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            r = tl.load(residual + row * residual_stride + c, mask=mask, other=0.0).to(tl.float32)
        g = d * w
        squares, products = tl.reduce((u * u, g * u), 0, _add_both)
        rstd = _rsqrt(squares / D + eps)
        dx = g * rstd - u * (rstd * rstd * rstd * products / D)
        if HAS_RESIDUAL:
            dx += r
        if WEIGHT_GRAD:
            dw += d * (u * rstd)
        tl.store(out + row * out_stride + c, dx.to(out.dtype.element_ty), mask=mask)
        if NORMED:
            tl.store(normed + row * normed_stride + c, (u * rstd * w).to(normed.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        tl.store(partials + program.to(tl.int64) * D + c, dw, mask=mask)


def _row_tile(D: int) -> tuple[int, int]:
    """Columns and warps of a program that holds a row: 16 columns a thread, two 16-byte loads of bf16."""
    block = triton.next_power_of_2(D)
    return block, min(max(block // 512, 1), 16)


def rms_norm_triton(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, residual: Tensor | None, out: Tensor
) -> None:
    T, D = x_TD.shape
    if T == 0:
        return
    r = x_TD if residual is None else residual
    block, warps = _row_tile(D)
    _rms_norm_kernel[(T,)](
        x_TD, weight_D, r, out, x_TD.stride(0), r.stride(0), out.stride(0), eps, offset,
        D=D, HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def rms_norm_backward_triton(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float,
    residual: Tensor | None,
    weight_grad: Tensor | None,
    normed: Tensor | None,
    out: Tensor,
) -> None:
    T, D = x_TD.shape
    if T == 0:
        return
    r, y = x_TD if residual is None else residual, out if normed is None else normed
    programs = T
    partials = x_TD
    if weight_grad is not None:
        rows = triton.cdiv(T, _BACKWARD_PROGRAMS)
        programs = triton.cdiv(T, rows)  # as many rows for each as can be
        partials = torch.empty(programs, D, device=x_TD.device, dtype=torch.float32)
    block, warps = _row_tile(D)
    _rms_norm_backward_kernel[(programs,)](
        dy_TD, x_TD, weight_D, r, out, y, partials,
        dy_TD.stride(0), x_TD.stride(0), r.stride(0), out.stride(0), y.stride(0), T, eps, offset,
        D=D, HAS_RESIDUAL=residual is not None, WEIGHT_GRAD=weight_grad is not None, NORMED=normed is not None,
        BLOCK=block, num_warps=warps, num_stages=1,
    )  # fmt: skip
    if weight_grad is not None:
        weight_grad += partials.sum(0)


def rms_norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[residual +] norm(x). out may be x or residual."""
    if out is None:
        out = torch.empty(x_TD.shape, device=x_TD.device, dtype=x_TD.dtype)
    if fused(x_TD):
        rms_norm_triton(x_TD, weight_D, eps, offset, residual, out)
        return out
    return out.copy_(rms_norm_reference(x_TD, weight_D, eps, offset, residual))


def rms_norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    residual: Tensor | None = None,
    weight_grad: Tensor | None = None,
    normed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """dx [+ residual], the gradient that came by the skip path. out may be residual, dy or x.

    weight_grad [D], fp32: dw is added to it, in an order that depends on the shape alone. normed [T, D]: is written
    with norm(x), as `rms_norm` gives it; apart from all others.
    """
    if out is None:
        out = torch.empty(dy_TD.shape, device=dy_TD.device, dtype=dy_TD.dtype)
    if fused(x_TD):
        rms_norm_backward_triton(dy_TD, x_TD, weight_D, eps, offset, residual, weight_grad, normed, out)
        return out
    if normed is not None:
        normed.copy_(rms_norm_reference(x_TD, weight_D, eps, offset))
    dx, dw = rms_norm_backward_reference(dy_TD, x_TD, weight_D, eps, offset, residual)
    if weight_grad is not None:
        weight_grad += dw
    return out.copy_(dx)
