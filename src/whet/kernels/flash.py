"""Attention within documents, tile by tile, with a soft cap on the scores, which torch's FlashAttention lacks.

The formulas are those of `attention.py`. Forward: one program takes a block of queries of one head over the keys that
it sees and keeps the running maximum and sum of the softmax. Backward: one kernel takes a block of keys over the
queries that see them, for dk and dv, and one a block of queries again, for dq, so that every sum has one owner and one
order. Every tile is masked, also where all of it is seen: loops for those apart cost more in spilled registers than the
comparisons do.

Scores, statistics and sums in fp32; p and ds are rounded to the inputs' 16 bits for the tensor cores. Exponentials are
of base 2, and tanh x = 1 - 2 / (1 + exp 2x): the GPU's own tanh is good to 11 bits, which a cap of 50 makes 0.02.
Source: Dao 2023, arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867 (the running softmax).

Shapes: q, out [T, H, d]; k, v [T, G, d]; lse, delta [H, T]. T tokens, H query heads, G key heads, d head size, at most
256. Any strides with the last dimension contiguous. cu_seqlens [N + 1] int32, or None for rows of `longest` tokens.
"""

# mypy: disable-error-code=no-untyped-def
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whet.kernels._triton import jit, tl, triton


class Tiles(NamedTuple):
    """Queries and keys of a tile; tiles are loaded `stages` ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and padded head size, for the shared memory of Hopper, of an A100, and of the rest from Ampere on. They fit
# with 16-bit inputs, and ptxas spills no more than a few dozen bytes of them; larger ones spill hundreds.
_SHARED_MEMORY = (200 * 1024, 150 * 1024, 0)
_TILES = {
    ("forward", 64): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    ("forward", 128): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    ("forward", 256): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 8, 2)),
    ("keys", 64): (Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 2)),
    ("keys", 128): (Tiles(32, 128, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
    ("keys", 256): (Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 32, 8, 2)),
    ("queries", 64): (Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2)),
    ("queries", 128): (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2)),
    ("queries", 256): (Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 4, 2)),
}


@jit
def _document(cu_seqlens, longest, RAGGED: tl.constexpr):
    """First token and length of this program's document."""
    document = tl.program_id(0)
    if RAGGED:
        start = tl.load(cu_seqlens + document)
        length = tl.load(cu_seqlens + document + 1) - start
    else:
        start = document * longest
        length = longest
    return start.to(tl.int64), length


@jit
def _load(x, stride, first, length, D: tl.constexpr, BLOCK: tl.constexpr, D_BLOCK: tl.constexpr):
    """[BLOCK, D_BLOCK] from row `first` on; zeros from row `length` on and beyond column D."""
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, D_BLOCK)
    mask = (first + i < length)[:, None]
    if D < D_BLOCK:
        mask = mask & (c < D)[None, :]
    return tl.load(x + tl.cast(first, tl.int64) * stride + i[:, None] * stride + c[None, :], mask=mask, other=0.0)


@jit
def _store(x, stride, first, length, tile, D: tl.constexpr, BLOCK: tl.constexpr, D_BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c = tl.arange(0, D_BLOCK)
    pointers = x + tl.cast(first, tl.int64) * stride + i[:, None] * stride + c[None, :]
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=(first + i < length)[:, None] & (c < D)[None, :])


@jit
def _scores(product, inner, outer, CAPPED: tl.constexpr):
    """Scores in base 2, and their tanh where they are capped. Uncapped: product * inner."""
    tanh = product
    if CAPPED:
        tanh = 1.0 - 2.0 / (1.0 + tl.exp2(product * inner))
        scores = tanh * outer
    else:
        scores = product * inner
    return scores, tanh


@jit
def _sees(queries, keys, window, WINDOWED: tl.constexpr):
    """Which queries see which keys. Those beyond the document need no mask: no query in it sees their keys, and their
    queries and output gradients are loaded as zeros."""
    seen = keys <= queries
    if WINDOWED:
        seen = seen & (queries - keys < window)
    return seen


@jit
def _first_key(m, window, N: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the tiles of keys begin that query m and those after it see."""
    first = 0
    if WINDOWED:
        first = tl.maximum(m - window + 1, 0) // N * N
    return first


@jit
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, T, longest, window, inner, outer,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, out_stride, out_head,
    RATIO: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program a document, a block of queries and a head; the last blocks, which have most keys, come first."""
    start, length = _document(cu_seqlens, longest, RAGGED)
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    if m >= length:
        return
    head = tl.program_id(2).to(tl.int64)
    group = head // RATIO
    k += start * k_stride + group * k_head
    v += start * v_stride + group * v_head
    q_tile = _load(q + start * q_stride + head * q_head, q_stride, m, length, D, M, D_BLOCK)
    queries = m + tl.arange(0, M)
    acc = tl.zeros((M, D_BLOCK), tl.float32)
    # finite, so that a row which sees nothing of its first tile does not meet inf - inf
    peak = tl.full((M,), -1e30, tl.float32)
    total = tl.zeros((M,), tl.float32)
    for n in range(_first_key(m, window, N, WINDOWED), tl.minimum(m + M, length), N):
        k_tile = _load(k, k_stride, n, length, D, N, D_BLOCK)
        s, _ = _scores(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), inner, outer, CAPPED)
        keys = n + tl.arange(0, N)
        s = tl.where(_sees(queries[:, None], keys[None, :], window, WINDOWED), s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        decay = tl.exp2(peak - higher)
        total = total * decay + tl.sum(p, 1)
        v_tile = _load(v, v_stride, n, length, D, N, D_BLOCK)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
        peak = higher
    total = tl.maximum(total, 1e-30)  # rows beyond the document may have seen nothing; they are not stored
    _store(out + start * out_stride + head * out_head, out_stride, m, length, acc / total[:, None], D, M, D_BLOCK)
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + head * T + start + queries, (peak + tl.log2(total)) * ln2, mask=queries < length)


@jit
def _delta_kernel(
    dout, out, delta, T, dout_stride, dout_head, out_stride, out_head,
    D: tl.constexpr, M: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """delta = do . o for M tokens of one head."""
    first = tl.program_id(0) * M
    head = tl.program_id(1).to(tl.int64)
    do = _load(dout + head * dout_head, dout_stride, first, T, D, M, D_BLOCK).to(tl.float32)
    o = _load(out + head * out_head, out_stride, first, T, D, M, D_BLOCK).to(tl.float32)
    tokens = first + tl.arange(0, M)
    tl.store(delta + head * T + tokens, tl.sum(do * o, 1), mask=tokens < T)


@jit
def _keys_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens, T, longest, window, scale, inner, outer,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, dout_stride, dout_head,
    dk_stride, dk_head, dv_stride, dv_head,
    RATIO: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program a document, a block of keys and a key head, over the query heads that read it. Tiles are
    [keys, queries], so that p and ds are used as they come."""
    start, length = _document(cu_seqlens, longest, RAGGED)
    n = tl.program_id(1) * N
    if n >= length:
        return
    group = tl.program_id(2).to(tl.int64)
    k_tile = _load(k + start * k_stride + group * k_head, k_stride, n, length, D, N, D_BLOCK)
    v_tile = _load(v + start * v_stride + group * v_head, v_stride, n, length, D, N, D_BLOCK)
    keys = n + tl.arange(0, N)
    log2e: tl.constexpr = 1.4426950408889634
    dk_acc = tl.zeros((N, D_BLOCK), tl.float32)
    dv_acc = tl.zeros((N, D_BLOCK), tl.float32)
    last = length
    if WINDOWED:
        last = tl.minimum(length, n + N - 1 + window)
    for h in range(0, RATIO):
        head = group * RATIO + h
        q_h = q + start * q_stride + head * q_head
        dout_h = dout + start * dout_stride + head * dout_head
        lse_h = lse + head * T + start
        delta_h = delta + head * T + start
        for m in range(n // M * M, last, M):
            queries = m + tl.arange(0, M)
            q_tile = _load(q_h, q_stride, m, length, D, M, D_BLOCK)
            s, tanh = _scores(tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee"), inner, outer, CAPPED)
            lse_row = tl.load(lse_h + queries, mask=queries < length, other=0.0) * log2e
            p = tl.exp2(s - lse_row[None, :])
            p = tl.where(_sees(queries[None, :], keys[:, None], window, WINDOWED), p, 0.0)
            do = _load(dout_h, dout_stride, m, length, D, M, D_BLOCK)
            dv_acc = tl.dot(p.to(do.dtype), do, dv_acc, input_precision="ieee")
            delta_row = tl.load(delta_h + queries, mask=queries < length, other=0.0)
            ds = p * (tl.dot(v_tile, tl.trans(do), input_precision="ieee") - delta_row[None, :])
            if CAPPED:
                ds = ds * (1.0 - tanh * tanh)
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    _store(dk + start * dk_stride + group * dk_head, dk_stride, n, length, dk_acc * scale, D, N, D_BLOCK)
    _store(dv + start * dv_stride + group * dv_head, dv_stride, n, length, dv_acc, D, N, D_BLOCK)


@jit
def _queries_kernel(
    q, k, v, dout, lse, delta, dq, cu_seqlens, T, longest, window, scale, inner, outer,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, dout_stride, dout_head, dq_stride, dq_head,
    RATIO: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """One program a document, a block of queries and a head, as in the forward."""
    start, length = _document(cu_seqlens, longest, RAGGED)
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    if m >= length:
        return
    head = tl.program_id(2).to(tl.int64)
    group = head // RATIO
    k += start * k_stride + group * k_head
    v += start * v_stride + group * v_head
    q_tile = _load(q + start * q_stride + head * q_head, q_stride, m, length, D, M, D_BLOCK)
    do = _load(dout + start * dout_stride + head * dout_head, dout_stride, m, length, D, M, D_BLOCK)
    queries = m + tl.arange(0, M)
    log2e: tl.constexpr = 1.4426950408889634
    lse_row = tl.load(lse + head * T + start + queries, mask=queries < length, other=0.0) * log2e
    delta_row = tl.load(delta + head * T + start + queries, mask=queries < length, other=0.0)
    acc = tl.zeros((M, D_BLOCK), tl.float32)
    for n in range(_first_key(m, window, N, WINDOWED), tl.minimum(m + M, length), N):
        k_tile = _load(k, k_stride, n, length, D, N, D_BLOCK)
        s, tanh = _scores(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), inner, outer, CAPPED)
        p = tl.exp2(s - lse_row[:, None])
        keys = n + tl.arange(0, N)
        p = tl.where(_sees(queries[:, None], keys[None, :], window, WINDOWED), p, 0.0)
        v_tile = _load(v, v_stride, n, length, D, N, D_BLOCK)
        ds = p * (tl.dot(do, tl.trans(v_tile), input_precision="ieee") - delta_row[:, None])
        if CAPPED:
            ds = ds * (1.0 - tanh * tanh)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    _store(dq + start * dq_stride + head * dq_head, dq_stride, m, length, acc * scale, D, M, D_BLOCK)


def flash_triton(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and lse [H, T]."""
    tokens, heads, _ = q_THd.shape
    out = q_THd.new_empty(q_THd.shape)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q_THd.device)
    if tokens == 0:
        return out, lse
    tiles, options = _options("forward", q_THd, k_TGd, cu_seqlens, window, softcap)
    _forward_kernel[(_documents(q_THd, cu_seqlens, longest), triton.cdiv(longest, tiles.queries), heads)](
        q_THd, k_TGd, v_TGd, out, lse, cu_seqlens, tokens, longest, window or 0, *_factors(scale, softcap),
        *_strides(q_THd, k_TGd, v_TGd, out), **options,
    )  # fmt: skip
    return out, lse


def flash_backward_triton(
    dout_THd: Tensor,
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    out_THd: Tensor,
    lse_HT: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    tokens, heads, width = q_THd.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_THd, k_TGd, v_TGd))
    if tokens == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse_HT)
    _delta_kernel[(triton.cdiv(tokens, 32), heads)](
        dout_THd, out_THd, delta, tokens, *_strides(dout_THd, out_THd), width, 32, _padded(width), num_warps=4
    )
    documents = _documents(q_THd, cu_seqlens, longest)
    given = (q_THd, k_TGd, v_TGd, dout_THd)
    scalars = (cu_seqlens, tokens, longest, window or 0, scale, *_factors(scale, softcap))
    tiles, options = _options("keys", q_THd, k_TGd, cu_seqlens, window, softcap)
    _keys_kernel[(documents, triton.cdiv(longest, tiles.keys), k_TGd.shape[1])](
        *given, lse_HT, delta, dk, dv, *scalars, *_strides(*given, dk, dv), **options
    )
    tiles, options = _options("queries", q_THd, k_TGd, cu_seqlens, window, softcap)
    _queries_kernel[(documents, triton.cdiv(longest, tiles.queries), heads)](
        *given, lse_HT, delta, dq, *scalars, *_strides(*given, dq), **options
    )
    return dq, dk, dv


def _documents(q: Tensor, cu_seqlens: Tensor | None, longest: int) -> int:
    return q.shape[0] // longest if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """What q . k is multiplied by inside the exponential of tanh, and tanh afterwards; uncapped, the score's factor."""
    log2e = math.log2(math.e)
    return (scale * log2e, 0.0) if softcap is None else (2 * log2e * scale / softcap, softcap * log2e)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _options(
    kernel: str, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, window: int | None, softcap: float | None
) -> tuple[Tiles, dict[str, Any]]:
    width = q.shape[2]
    tiles = _tiles(kernel, _padded(width), q.device)
    return tiles, {
        "RATIO": q.shape[1] // k.shape[1],
        "D": width,
        "M": tiles.queries,
        "N": tiles.keys,
        "D_BLOCK": _padded(width),
        "CAPPED": softcap is not None,
        "WINDOWED": window is not None,
        "RAGGED": cu_seqlens is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _tiles(kernel: str, padded: int, device: torch.device) -> Tiles:
    shared = _shared_memory(device)
    return next(t for least, t in zip(_SHARED_MEMORY, _TILES[kernel, max(64, padded)], strict=True) if shared >= least)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have; under the interpreter there is no limit."""
    if device.type != "cuda":
        return 2**30
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])
