"""Gated activations, forward and backward, each in one pass.

    act = f(gate) * up
    dgate = dact * up * f'(gate),   dup = dact * f(gate)
    f: silu        z * sigmoid(z)
       gelu_tanh   z * sigmoid(2 c (z + 0.044715 z^3)), c = sqrt(2 / pi), which is z (1 + tanh(c ...)) / 2
       gelu        z * (1 + erf(z / sqrt(2))) / 2

Inside all is fp32 (the references: fp64 where given fp64), rounded once when a result is stored.
Source: Shazeer 2020, arXiv:2002.05202.
Shapes: gate_up [T, 2F], gate first; act, dact [T, F]; T tokens, F width of the MLP.
"""

from __future__ import annotations

import math

import torch

from whet.kernels._precision import wide
from whet.kernels._triton import HAVE_TRITON, jit, tl, triton

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def glu_reference(gate_up_T2F: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """`glu` in torch."""
    gate, up = wide(gate_up_T2F).chunk(2, dim=-1)
    return _into(_activate(gate, activation)[0] * up, out, gate_up_T2F.dtype)


def glu_backward_reference(
    dact_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    activation: str,
    *,
    act: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`glu_backward` in torch."""
    gate, up = wide(gate_up_T2F).chunk(2, dim=-1)
    f, df = _activate(gate, activation)
    dact = dact_TF.to(gate.dtype)
    grads = torch.cat((dact * up * df, dact * f), dim=-1)  # whole before a write: `out` may be `gate_up`
    if act is not None:
        act.copy_(f * up)
    return _into(grads, out, gate_up_T2F.dtype)


def _activate(z: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f(z) and f'(z)."""
    if activation == "silu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    if activation == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        s = torch.sigmoid(2 * c * (z + 0.044715 * z**3))
        return z * s, s + z * s * (1 - s) * 2 * c * (1 + 3 * 0.044715 * z * z)
    cdf = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    return z * cdf, cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _into(values: torch.Tensor, out: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype) if out is None else out.copy_(values)


@jit
def _sigmoid(z):
    """1 / (1 + e^-z) in five instructions, not eleven: 2^x is one, and so is 1 / sqrt(q^2), where tl.exp and a quotient
    take care of numbers near the ends of fp32's range. It is 0 below z = -44, where it would be less than 1e-19."""
    q = 1.0 + tl.exp2(-1.4426950408889634 * z)
    return tl.rsqrt(q * q)


@jit
def _f_and_derivative(z, ACTIVATION: tl.constexpr):
    """f(z) and f'(z) in fp32. Both kernels call it, so that a recomputed act is bitwise the first one."""
    if ACTIVATION == "silu":
        s = _sigmoid(z)
        f = z * s
        df = s * (1 + z * (1 - s))
    elif ACTIVATION == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        f = z * s
        df = s + f * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
    else:
        s = 0.5 + 0.5 * tl.erf(0.7071067811865476 * z)
        f = z * s
        df = s + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return f, df


@jit
def _glu_kernel(gate_up, out, gate_up_stride, out_stride, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=mask, other=0.0).to(tl.float32)
    f, _ = _f_and_derivative(gate, ACTIVATION)
    tl.store(out + row * out_stride + column, (f * up).to(out.dtype.element_ty), mask=mask)


@jit
def _glu_backward_kernel(
    dact, gate_up, act, out, dact_stride, gate_up_stride, act_stride, out_stride, F,
    ACTIVATION: tl.constexpr, STORE_ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one token, read before they are written: out may be gate_up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + F + column, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(dact + row * dact_stride + column, mask=mask, other=0.0).to(tl.float32)
    f, df = _f_and_derivative(gate, ACTIVATION)
    if STORE_ACT:
        tl.store(act + row * act_stride + column, (f * up).to(act.dtype.element_ty), mask=mask)
    tl.store(out + row * out_stride + column, (da * up * df).to(out.dtype.element_ty), mask=mask)
    tl.store(out + row * out_stride + F + column, (da * f).to(out.dtype.element_ty), mask=mask)


def glu_triton(gate_up_T2F: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """`glu` in one launch."""
    T, F = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out = torch.empty(T, F, device=gate_up_T2F.device, dtype=gate_up_T2F.dtype) if out is None else out
    if out.numel() == 0:
        return out
    block = _columns(F)
    _glu_kernel[(T, triton.cdiv(F, block))](
        gate_up_T2F, out, gate_up_T2F.stride(0), out.stride(0), F, ACTIVATION=activation, BLOCK=block, num_warps=4
    )
    return out


def glu_backward_triton(
    dact_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    activation: str,
    *,
    act: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`glu_backward` in one launch."""
    T, F = dact_TF.shape
    out = torch.empty(T, 2 * F, device=gate_up_T2F.device, dtype=gate_up_T2F.dtype) if out is None else out
    if out.numel() == 0:
        return out
    block = _columns(F)
    _glu_backward_kernel[(T, triton.cdiv(F, block))](
        dact_TF,
        gate_up_T2F,
        act,
        out,
        dact_TF.stride(0),
        gate_up_T2F.stride(0),
        0 if act is None else act.stride(0),
        out.stride(0),
        F,
        ACTIVATION=activation,
        STORE_ACT=act is not None,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _columns(F: int) -> int:
    """Columns a program of four warps: up to 16 a lane, so that each of its loads is two of 16 bytes."""
    return min(2048, max(128, 1 << (F - 1).bit_length()))


def glu(gate_up_T2F: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """f(gate) * up as [T, F], into `out` where given (any row stride)."""
    T, width = gate_up_T2F.shape
    _check(activation, gate_up_T2F, out=(out, T, width // 2))
    run = glu_triton if gate_up_T2F.is_cuda and HAVE_TRITON else glu_reference
    return run(gate_up_T2F, activation, out)


def glu_backward(
    dact_TF: torch.Tensor,
    gate_up_T2F: torch.Tensor,
    activation: str,
    *,
    act: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of gate_up as [T, 2F], into `out` where given: any row stride, and it may be `gate_up` itself.

    `act` [T, F], where given, is written with f(gate) * up, so that it need not be kept from the forward pass.
    """
    T, width = gate_up_T2F.shape
    _check(activation, gate_up_T2F, dact=(dact_TF, T, width // 2), act=(act, T, width // 2), out=(out, T, width))
    run = glu_backward_triton if gate_up_T2F.is_cuda and HAVE_TRITON else glu_backward_reference
    return run(dact_TF, gate_up_T2F, activation, act=act, out=out)


def _check(activation: str, gate_up_T2F: torch.Tensor, **others: tuple[torch.Tensor | None, int, int]) -> None:
    """The kernels go by these shapes, whatever the tensors have. `others`: each with its rows and columns."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    if gate_up_T2F.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up_T2F.shape)}; its columns must be gate and up, as many of each")
    for name, (x, rows, columns) in {"gate_up": (gate_up_T2F, *gate_up_T2F.shape), **others}.items():
        if x is not None and (x.shape != (rows, columns) or x.stride(-1) != 1):
            found = f"{tuple(x.shape)} with strides {x.stride()}"
            raise ValueError(f"{name} is {found}; it must be {(rows, columns)}, its last dimension contiguous")
