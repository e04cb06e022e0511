"""Rotary position embedding of q and k inside the fused q/k/v rows, with their per-head RMSNorm, and its backward.

    a' = a cos - b sin,   b' = b cos + a sin          a, b: first and second half of a head's first rot values
    before it, where a family has it: x <- x * rstd * (offset + w), over a head's d values

The halves are rotated against each other, as transformers' Llama does; values beyond rot = 2 * cos.shape[1] pass
through, and so does v. Token t uses row t % P of the tables. The tables may carry a scale (YaRN's, LongRoPE's): the
backward is the transpose, not the inverse. Everything in fp32, one rounding when a result is stored (fp64 on the
reference path when the input is fp64). Source: Su et al. 2021, arXiv:2104.09864.
Shapes: qkv [T, W], W = (H + 2 G) d; dq [T, H, d]; dk, dv [T, G, d]; cos, sin [P, rot / 2]; w [d]; T tokens, H query
heads, G key/value heads, d head width.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import torch
from torch import Tensor

from whet.kernels._precision import wide
from whet.kernels._triton import fused, jit, tl, triton

_WARPS = 2
_TILE = 1024  # values of each half of the heads in a program: 16 a thread, two 16-byte loads of bf16
_GRADIENT_SLOTS = 512  # programs that share the tokens of one head block where a norm weight's gradient is summed


def _rows(table: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """[T, 1, rot/2]: a row of the table for each token."""
    return table[torch.arange(T, device=table.device) % table.shape[0]].to(dtype)[:, None]


def _rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x_THd[..., :half], x_THd[..., half : 2 * half], x_THd[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _norm(x_THd: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    if weight is None:
        return x_THd
    return x_THd * torch.rsqrt(x_THd.square().mean(-1, keepdim=True) + eps) * (offset + weight.to(x_THd.dtype))


def _norm_backward(
    dy_THd: Tensor, x_THd: Tensor, weight: Tensor, eps: float, offset: float, weight_grad: Tensor | None
) -> Tensor:
    rstd = torch.rsqrt(x_THd.square().mean(-1, keepdim=True) + eps)
    xhat = x_THd * rstd
    if weight_grad is not None:
        weight_grad += (dy_THd * xhat).sum((0, 1))
    g = dy_THd * (offset + weight.to(x_THd.dtype))
    return rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))


def rope_reference(
    qkv_TW: Tensor,
    cos_PC: Tensor,
    sin_PC: Tensor,
    q_heads: int,
    kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> Tensor:
    """Not rounded: fp32 or fp64."""
    (T, W), n = qkv_TW.shape, q_heads + 2 * kv_heads
    heads = wide(qkv_TW).view(T, n, W // n)
    q, k, v = heads[:, :q_heads], heads[:, q_heads:-kv_heads], heads[:, -kv_heads:]
    cos, sin = (_rows(table, T, heads.dtype) for table in (cos_PC, sin_PC))
    q = _rotate(_norm(q, q_weight, eps, offset), cos, sin)
    k = _rotate(_norm(k, k_weight, eps, offset), cos, sin)
    return torch.cat([q, k, v], 1).flatten(1)


def rope_backward_reference(
    dq_THd: Tensor,
    dk_TGd: Tensor,
    dv_TGd: Tensor,
    cos_PC: Tensor,
    sin_PC: Tensor,
    qkv_TW: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    q_weight_grad: Tensor | None = None,
    k_weight_grad: Tensor | None = None,
) -> Tensor:
    """Not rounded: fp32 or fp64. Adds to the weights' gradients."""
    (T, H, d), G = dq_THd.shape, dk_TGd.shape[1]
    dq, dk, dv = wide(dq_THd), wide(dk_TGd), wide(dv_TGd)
    cos, sin = (_rows(table, T, dq.dtype) for table in (cos_PC, sin_PC))
    dq, dk = _rotate(dq, cos, -sin), _rotate(dk, cos, -sin)
    if q_weight is not None or k_weight is not None:
        assert qkv_TW is not None
        heads = qkv_TW.to(dq.dtype).view(T, H + 2 * G, d)
        if q_weight is not None:
            dq = _norm_backward(dq, heads[:, :H], q_weight, eps, offset, q_weight_grad)
        if k_weight is not None:
            dk = _norm_backward(dk, heads[:, H:-G], k_weight, eps, offset, k_weight_grad)
    return torch.cat([dq, dk, dv], 1).flatten(1)


@jit
def _copy_heads(
    src, dst, src_head, dst_head, first,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    h = first + tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, D_BLOCK)[None, :]
    mask = (h < HEADS) & (c < D)
    x = tl.load(src + h.to(tl.int64) * src_head + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst + h * dst_head + c, x.to(dst.dtype.element_ty), mask=mask)


@jit
def _rotate_heads(
    src, dst, cos, sin, weight, eps, offset, first,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, COPY_REST: tl.constexpr,
    BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads first .. first + BLOCK of one token: norm, rotation. dst may be src."""
    h = first + tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, HALF_BLOCK)[None, :]
    inside = c < HALF
    mask = (h < HEADS) & inside
    at = h * D + c
    a = tl.load(src + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(src + at + HALF, mask=mask, other=0.0).to(tl.float32)
    co = tl.load(cos + c, mask=inside, other=0.0).to(tl.float32)
    si = tl.load(sin + c, mask=inside, other=0.0).to(tl.float32)
    if COPY_REST:
        e = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        rest_mask = (h < HEADS) & (e < D)
        rest = tl.load(src + h * D + e, mask=rest_mask, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if COPY_REST:
            squares += tl.sum(rest * rest, axis=1)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))[:, None]
        a = a * rstd * (tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) + offset)
        b = b * rstd * (tl.load(weight + c + HALF, mask=inside, other=0.0).to(tl.float32) + offset)
        if COPY_REST:
            rest = rest * rstd * (tl.load(weight + e, mask=e < D, other=0.0).to(tl.float32) + offset)
    tl.store(dst + at, (a * co - b * si).to(dst.dtype.element_ty), mask=mask)
    tl.store(dst + at + HALF, (b * co + a * si).to(dst.dtype.element_ty), mask=mask)
    if COPY_REST:
        tl.store(dst + h * D + e, rest.to(dst.dtype.element_ty), mask=rest_mask)


@jit
def _rope_kernel(
    qkv, out, cos, sin, q_weight, k_weight, qkv_stride, out_stride, cos_stride, sin_stride, P, eps, offset,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    IN_PLACE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a token and block of heads, of q, of k, or of v where v has to be copied."""
    Q_BLOCKS: tl.constexpr = (H + Q_BLOCK - 1) // Q_BLOCK
    K_BLOCKS: tl.constexpr = (G + K_BLOCK - 1) // K_BLOCK
    BLOCKS: tl.constexpr = Q_BLOCKS + K_BLOCKS if IN_PLACE else Q_BLOCKS + 2 * K_BLOCKS
    t = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    src = qkv + t.to(tl.int64) * qkv_stride
    dst = out + t.to(tl.int64) * out_stride
    p = (t % P).to(tl.int64)
    REST: tl.constexpr = D > 2 * HALF
    if block < Q_BLOCKS:
        _rotate_heads(
            src, dst, cos + p * cos_stride, sin + p * sin_stride, q_weight, eps, offset, block * Q_BLOCK,
            H, D, HALF, Q_NORM, REST and (Q_NORM or not IN_PLACE), Q_BLOCK, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    elif block < Q_BLOCKS + K_BLOCKS:
        _rotate_heads(
            src + H * D, dst + H * D, cos + p * cos_stride, sin + p * sin_stride, k_weight, eps, offset,
            (block - Q_BLOCKS) * K_BLOCK,
            G, D, HALF, K_NORM, REST and (K_NORM or not IN_PLACE), K_BLOCK, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        _copy_heads(
            src + (H + G) * D, dst + (H + G) * D, D, D, (block - Q_BLOCKS - K_BLOCKS) * K_BLOCK, G, D, K_BLOCK, D_BLOCK
        )


@jit
def _rotate_heads_back(
    dy, x, dst, cos, sin, weight, partials, dy_token, dy_head, x_token, dst_token, cos_token, sin_token,
    T, P, eps, offset, first, slot, slots,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, WEIGHT_GRAD: tl.constexpr,
    REST: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads first .. first + BLOCK of a token, or for a weight gradient of tokens slot, slot + slots, ..."""
    h = first + tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, HALF_BLOCK)[None, :]
    e = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    inside = c < HALF
    mask = (h < HEADS) & inside
    rest_mask = (h < HEADS) & (e < D)
    at = h * D + c
    dy_at = h.to(tl.int64) * dy_head + c
    if NORM:
        wa = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) + offset
        wb = tl.load(weight + c + HALF, mask=inside, other=0.0).to(tl.float32) + offset
        if REST:
            wr = tl.load(weight + e, mask=e < D, other=0.0).to(tl.float32) + offset
    if WEIGHT_GRAD:
        sum_a = tl.zeros((BLOCK, HALF_BLOCK), tl.float32)
        sum_b = tl.zeros((BLOCK, HALF_BLOCK), tl.float32)
        sum_r = tl.zeros((BLOCK, REST_BLOCK), tl.float32)
    for t in range(slot, T, slots):
        token = tl.cast(t, tl.int64)
        p = tl.cast(t % P, tl.int64)
        dy_row = dy + token * dy_token
        dst_row = dst + token * dst_token
        a = tl.load(dy_row + dy_at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(dy_row + dy_at + HALF, mask=mask, other=0.0).to(tl.float32)
        co = tl.load(cos + p * cos_token + c, mask=inside, other=0.0).to(tl.float32)
        si = tl.load(sin + p * sin_token + c, mask=inside, other=0.0).to(tl.float32)
        ga = a * co + b * si
        gb = b * co - a * si
        if REST:
            gr = tl.load(dy_row + h.to(tl.int64) * dy_head + e, mask=rest_mask, other=0.0).to(tl.float32)
        if NORM:
            x_row = x + token * x_token
            xa = tl.load(x_row + at, mask=mask, other=0.0).to(tl.float32)
            xb = tl.load(x_row + at + HALF, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(xa * xa, axis=1) + tl.sum(xb * xb, axis=1)
            if REST:
                xr = tl.load(x_row + h * D + e, mask=rest_mask, other=0.0).to(tl.float32)
                squares += tl.sum(xr * xr, axis=1)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps))[:, None]
            xa *= rstd
            xb *= rstd
            if WEIGHT_GRAD:
                sum_a += ga * xa
                sum_b += gb * xb
            ga *= wa
            gb *= wb
            product = tl.sum(ga * xa, axis=1) + tl.sum(gb * xb, axis=1)
            if REST:
                xr *= rstd
                if WEIGHT_GRAD:
                    sum_r += gr * xr
                gr *= wr
                product += tl.sum(gr * xr, axis=1)
            mean = (product / D)[:, None]
            ga = rstd * (ga - xa * mean)
            gb = rstd * (gb - xb * mean)
            if REST:
                gr = rstd * (gr - xr * mean)
        tl.store(dst_row + at, ga.to(dst.dtype.element_ty), mask=mask)
        tl.store(dst_row + at + HALF, gb.to(dst.dtype.element_ty), mask=mask)
        if REST:
            tl.store(dst_row + h * D + e, gr.to(dst.dtype.element_ty), mask=rest_mask)
    if WEIGHT_GRAD:
        cc = tl.arange(0, HALF_BLOCK)
        tl.store(partials + cc, tl.sum(sum_a, axis=0), mask=cc < HALF)
        tl.store(partials + HALF + cc, tl.sum(sum_b, axis=0), mask=cc < HALF)
        if REST:
            ee = 2 * HALF + tl.arange(0, REST_BLOCK)
            tl.store(partials + ee, tl.sum(sum_r, axis=0), mask=ee < D)


@jit
def _rope_backward_kernel(
    dq, dk, dv, qkv, out, cos, sin, q_weight, k_weight, q_partials, k_partials,
    dq_token, dq_head, dk_token, dk_head, dv_token, dv_head, qkv_stride, out_stride, cos_stride, sin_stride,
    T, P, slots, eps, offset,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    Q_GRAD: tl.constexpr, K_GRAD: tl.constexpr, COPY_V: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    D_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    Q_BLOCKS: tl.constexpr = (H + Q_BLOCK - 1) // Q_BLOCK
    K_BLOCKS: tl.constexpr = (G + K_BLOCK - 1) // K_BLOCK
    BLOCKS: tl.constexpr = Q_BLOCKS + 2 * K_BLOCKS if COPY_V else Q_BLOCKS + K_BLOCKS
    slot = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    REST: tl.constexpr = D > 2 * HALF
    if block < Q_BLOCKS:
        _rotate_heads_back(
            dq, qkv, out, cos, sin, q_weight, q_partials + (slot * Q_BLOCKS + block) * D,
            dq_token, dq_head, qkv_stride, out_stride, cos_stride, sin_stride, T, P, eps, offset, block * Q_BLOCK,
            slot, slots, H, D, HALF, Q_NORM, Q_GRAD, REST, Q_BLOCK, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    elif block < Q_BLOCKS + K_BLOCKS:
        k_block = block - Q_BLOCKS
        _rotate_heads_back(
            dk, qkv + H * D, out + H * D, cos, sin, k_weight, k_partials + (slot * K_BLOCKS + k_block) * D,
            dk_token, dk_head, qkv_stride, out_stride, cos_stride, sin_stride, T, P, eps, offset, k_block * K_BLOCK,
            slot, slots, G, D, HALF, K_NORM, K_GRAD, REST, K_BLOCK, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        first = (block - Q_BLOCKS - K_BLOCKS) * K_BLOCK
        for t in range(slot, T, slots):
            token = tl.cast(t, tl.int64)
            _copy_heads(
                dv + token * dv_token, out + (H + G) * D + token * out_stride, dv_head, D, first, G, D, K_BLOCK, D_BLOCK
            )


def _tiles(H: int, G: int, d: int, half: int) -> dict[str, int]:
    """Heads and columns of a program's tiles, and its warps."""
    most = max(2 * _TILE // triton.next_power_of_2(d), 1)
    q, k = (int(min(triton.next_power_of_2(n), most)) for n in (H, G))
    columns, rest = triton.next_power_of_2(half), triton.next_power_of_2(max(d - 2 * half, 1))
    # In place no value may be loaded by two warps: one could load what the other has already stored.
    least = min(q, k) * min(columns, rest if d > 2 * half else columns)
    return {
        "Q_BLOCK": q,
        "K_BLOCK": k,
        "D_BLOCK": triton.next_power_of_2(d),
        "HALF_BLOCK": columns,
        "REST_BLOCK": rest,
        "num_warps": _WARPS if least >= 32 * _WARPS else 1,
    }


def rope_triton(
    qkv_TW: Tensor,
    cos_PC: Tensor,
    sin_PC: Tensor,
    q_heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    out: Tensor,
) -> None:
    (T, W), (P, half) = qkv_TW.shape, cos_PC.shape
    if T == 0:
        return
    d = W // (q_heads + 2 * kv_heads)
    in_place = out.data_ptr() == qkv_TW.data_ptr()
    tiles = _tiles(q_heads, kv_heads, d, half)
    blocks = triton.cdiv(q_heads, tiles["Q_BLOCK"]) + triton.cdiv(kv_heads, tiles["K_BLOCK"]) * (1 if in_place else 2)
    _rope_kernel[(T * blocks,)](
        qkv_TW, out, cos_PC, sin_PC, cos_PC if q_weight is None else q_weight, cos_PC if k_weight is None else k_weight,
        qkv_TW.stride(0), out.stride(0), cos_PC.stride(0), sin_PC.stride(0), P, eps, offset,
        H=q_heads, G=kv_heads, D=d, HALF=half, Q_NORM=q_weight is not None, K_NORM=k_weight is not None,
        IN_PLACE=in_place, **tiles,
    )  # fmt: skip


def rope_backward_triton(
    dq_THd: Tensor,
    dk_TGd: Tensor,
    dv_TGd: Tensor,
    cos_PC: Tensor,
    sin_PC: Tensor,
    qkv_TW: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    offset: float,
    q_weight_grad: Tensor | None,
    k_weight_grad: Tensor | None,
    out: Tensor,
) -> None:
    (T, H, d), G, (P, half) = dq_THd.shape, dk_TGd.shape[1], cos_PC.shape
    if T == 0:
        return
    tiles = _tiles(H, G, d, half)
    q_blocks, k_blocks = triton.cdiv(H, tiles["Q_BLOCK"]), triton.cdiv(G, tiles["K_BLOCK"])
    slots = T
    q_partials = k_partials = cos_PC
    if q_weight_grad is not None or k_weight_grad is not None:
        slots = triton.cdiv(T, triton.cdiv(T, _GRADIENT_SLOTS))
        q_partials = torch.empty(slots * q_blocks, d, device=out.device, dtype=torch.float32)
        k_partials = torch.empty(slots * k_blocks, d, device=out.device, dtype=torch.float32)
    v = out[:, (H + G) * d :]
    copy_v = dv_TGd.data_ptr() != v.data_ptr() or dv_TGd.stride() != (out.stride(0), d, 1)
    x = out if qkv_TW is None else qkv_TW
    _rope_backward_kernel[(slots * (q_blocks + k_blocks * (2 if copy_v else 1)),)](
        dq_THd, dk_TGd, dv_TGd, x, out, cos_PC, sin_PC,
        cos_PC if q_weight is None else q_weight, cos_PC if k_weight is None else k_weight, q_partials, k_partials,
        dq_THd.stride(0), dq_THd.stride(1), dk_TGd.stride(0), dk_TGd.stride(1), dv_TGd.stride(0), dv_TGd.stride(1),
        x.stride(0), out.stride(0), cos_PC.stride(0), sin_PC.stride(0), T, P, slots, eps, offset,
        H=H, G=G, D=d, HALF=half, Q_NORM=q_weight is not None, K_NORM=k_weight is not None,
        Q_GRAD=q_weight_grad is not None, K_GRAD=k_weight_grad is not None, COPY_V=copy_v,
        **tiles, num_stages=1,
    )  # fmt: skip
    if q_weight_grad is not None:
        q_weight_grad += q_partials.sum(0)
    if k_weight_grad is not None:
        k_weight_grad += k_partials.sum(0)


def rope(
    qkv_TW: Tensor,
    cos_PC: Tensor,
    sin_PC: Tensor,
    q_heads: int,
    kv_heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """qkv with q and k normed, where they have weights, and rotated. out may be qkv: v is then left alone."""
    if out is None:
        out = torch.empty(qkv_TW.shape, device=qkv_TW.device, dtype=qkv_TW.dtype)
    if fused(qkv_TW):
        rope_triton(qkv_TW, cos_PC, sin_PC, q_heads, kv_heads, q_weight, k_weight, eps, offset, out)
        return out
    return out.copy_(rope_reference(qkv_TW, cos_PC, sin_PC, q_heads, kv_heads, q_weight, k_weight, eps, offset))


def rope_backward(
    dq_THd: Tensor,
    dk_TGd: Tensor,
    dv_TGd: Tensor,
    cos_PC: Tensor,
    sin_PC: Tensor,
    *,
    qkv: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    q_weight_grad: Tensor | None = None,
    k_weight_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of rope's input [T, W]. With norm weights it needs qkv, that input before norm and rotation.

    dq, dk and dv may have any strides but the last, and may be views of out where they belong; out may be qkv.
    q_weight_grad, k_weight_grad [d], fp32: the gradient is added to them, in an order that depends on the shape alone.
    """
    if out is None:
        heads = dq_THd.shape[1] + 2 * dk_TGd.shape[1]
        out = torch.empty(dq_THd.shape[0], heads * dq_THd.shape[2], device=dq_THd.device, dtype=dq_THd.dtype)
    options = (qkv, q_weight, k_weight, eps, offset, q_weight_grad, k_weight_grad)
    if fused(dq_THd):
        rope_backward_triton(dq_THd, dk_TGd, dv_TGd, cos_PC, sin_PC, *options, out)
        return out
    return out.copy_(rope_backward_reference(dq_THd, dk_TGd, dv_TGd, cos_PC, sin_PC, *options))
