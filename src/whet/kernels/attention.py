"""Causal attention within each document of a batch, forward and backward, with the log-sum-exp kept for the backward.

    o_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)
    s_ij = scale * q_i . k_j,   or c * tanh(scale * q_i . k_j / c) under a soft cap c (Gemma 2)

over the keys j of i's own document with j <= i, and i - j < window where there is one: the window counts the query's
own key, as transformers' `sliding_window` does. Backward, from o and lse, with D_i = do_i . o_i:

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - D_i) * (1 - (s_ij / c)^2),
    dq_i = scale * sum_j ds_ij k_j,   dk_j = scale * sum_i ds_ij q_i

Source: Dao 2023, arXiv:2307.08691 (backward from lse); Gemma Team 2024, arXiv:2408.00118 (the cap).

On CUDA in 16 bits equal rows go to cuDNN on Hopper and later, ragged documents and sliding windows to FlashAttention,
soft caps to the kernels of `flash.py`; where FlashAttention 4 is installed (`flash4.py`), it takes the first two's
place on Hopper. cuDNN and FlashAttention 4 sum gradients in no fixed order: under torch's deterministic algorithms
FlashAttention 2 runs instead. All accumulate in fp32 and round p and ds to the inputs' 16 bits. The rest runs the
reference below, which computes in fp32 (fp64 for fp64 inputs) and holds one tile of scores at a time.

Shapes: q, out [T, H, d]; k, v [T, G, d], H a multiple of G, head h reading key head h // (H / G); lse [H, T].
T tokens, H query heads, G key heads, d head size. Any strides with the last dimension contiguous: q, k and v may be
slices of one projection. In the reference also n documents of one length L, r = H / G, b queries and m keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from whet.kernels._precision import wide_dtype
from whet.kernels._triton import HAVE_TRITON
from whet.kernels.flash import flash_backward_triton, flash_triton
from whet.kernels.flash4 import flash4, flash4_backward
from whet.kernels.flash4 import takes as flash4_takes

QUERY_BLOCK = 256  # queries of a reference's tile: shorter tiles skip more of the scores above the diagonal
TILE_BYTES = {"cpu": 2**18, "cuda": 2**28}  # of its scores: about what stays in cache on a CPU


@dataclass(frozen=True)
class Rows:
    """T = batch * length tokens; every row is one document."""

    batch: int
    length: int

    @property
    def longest(self) -> int:
        return self.length

    @property
    def lengths(self) -> list[int]:
        return [self.length] * self.batch


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents one after another. cu_seqlens: where each begins, and T at the end; int32 [N + 1], on the device."""

    cu_seqlens: Tensor
    longest: int

    @cached_property
    def lengths(self) -> list[int]:
        """In tokens. Waits for the device: only the reference reads it."""
        return self.cu_seqlens.diff().tolist()


Layout = Rows | Documents


def attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output [T, H, d], and what `attention_backward` needs besides it: lse first, in its back end's shape."""
    window = _effective(window, layout)
    backend = _backend(q_THd, layout, window, softcap)
    if q_THd.shape[0] == 0 or backend == "reference":
        out, lse = attention_reference(q_THd, k_TGd, v_TGd, layout, scale=scale, window=window, softcap=softcap)
        return out, (lse,)
    if backend == "cudnn":
        return _cudnn(q_THd, k_TGd, v_TGd, layout, scale)
    cu_seqlens, _, longest, _ = _bounds(layout)
    options: dict[str, Any] = {"scale": scale, "window": window}
    if backend == "triton":
        out, lse = flash_triton(q_THd, k_TGd, v_TGd, cu_seqlens, longest, softcap=softcap, **options)
        return out, (lse,)
    if backend == "flash4":
        out, lse = flash4(q_THd, k_TGd, v_TGd, cu_seqlens, longest, **options)
        return out, (lse,)
    return _flash(q_THd, k_TGd, v_TGd, layout, scale, window)


def attention_backward(
    dout_THd: Tensor,
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    out_THd: Tensor,
    saved: tuple[Tensor, ...],
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, H, d], dk and dv [T, G, d], from what `attention` took and returned."""
    window = _effective(window, layout)
    backend = _backend(q_THd, layout, window, softcap)
    given = (dout_THd, q_THd, k_TGd, v_TGd, out_THd)
    if q_THd.shape[0] == 0 or backend == "reference":
        return attention_backward_reference(*given, saved[0], layout, scale=scale, window=window, softcap=softcap)
    if backend == "cudnn":
        return _cudnn_backward(*given, saved, layout, scale)
    cu_seqlens, _, longest, _ = _bounds(layout)
    options: dict[str, Any] = {"scale": scale, "window": window}
    if backend == "triton":
        return flash_backward_triton(*given, saved[0], cu_seqlens, longest, softcap=softcap, **options)
    if backend == "flash4":
        return flash4_backward(*given, saved[0], cu_seqlens, longest, **options)
    return _flash_backward(*given, saved, layout, scale, window)


def _effective(window: int | None, layout: Layout) -> int | None:
    """None where no document is longer than the window."""
    return window if window is not None and window < layout.longest else None


def _backend(q: Tensor, layout: Layout, window: int | None, softcap: float | None) -> str:
    """flash4, cudnn, flash, triton or reference."""
    head = q.shape[2]
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or head > 256:
        return "reference"
    capability = _capability(q.device)
    # The kernels treat a query alone as a case of its own, and there is little to win with one key a query.
    if capability < (8, 0) or layout.longest == 1:
        return "reference"
    if softcap is not None or head % 8:
        return "triton" if HAVE_TRITON else "reference"
    if torch.are_deterministic_algorithms_enabled():
        return "flash"
    if flash4_takes(q, capability):
        return "flash4"
    if isinstance(layout, Rows) and window is None and head <= 128 and capability >= (9, 0) and _have_cudnn():
        return "cudnn"
    return "flash"


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _have_cudnn() -> bool:
    return torch.backends.cudnn.is_available()  # type: ignore[no-any-return, no-untyped-call]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, rows: Layout, scale: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    heads = (_by_row(x, rows).transpose(1, 2) for x in (q, k, v))
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, True, False, scale=scale)
    # cuDNN's output takes the order of q's strides, so that this is a view
    return result[0].transpose(1, 2).reshape(q.shape), (result[1], result[6], result[7])


def _cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    rows: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (_by_row(x, rows).transpose(1, 2) for x in (dout, q, k, v, out))
    length = rows.longest
    # None becomes an undefined tensor: no bias, and no cumulative lengths (with them its dQ is wrong)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads, *saved, None, None, None, length, length, 0.0, True, scale=scale
    )
    dq, dk, dv = (g.transpose(1, 2).reshape(x.shape) for g, x in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv


def _flash(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    bounds = _bounds(layout)
    result = torch.ops.aten._flash_attention_forward(
        *(_by_row(x, layout) for x in (q, k, v)), *bounds, 0.0, True, False, scale=scale, **_window_sizes(window)
    )
    return result[0].reshape(q.shape), (result[1], result[2], result[3])


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    layout: Layout,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    lse, *random_state = saved
    gradients = torch.ops.aten._flash_attention_backward(
        *(_by_row(x, layout) for x in (dout, q, k, v, out)),
        lse,
        *_bounds(layout),
        0.0,
        True,
        *random_state,
        scale=scale,
        **_window_sizes(window),
    )
    dq, dk, dv = (g.reshape(x.shape) for g, x in zip(gradients, (q, k, v), strict=True))
    return dq, dk, dv


def _by_row(x: Tensor, layout: Layout) -> Tensor:
    """[B, S, heads, d] where rows are documents; as it is for ragged documents."""
    return x.view(layout.batch, layout.length, *x.shape[1:]) if isinstance(layout, Rows) else x


def _bounds(layout: Layout) -> tuple[Tensor | None, Tensor | None, int, int]:
    bounds = layout.cu_seqlens if isinstance(layout, Documents) else None
    return bounds, bounds, layout.longest, layout.longest


def _window_sizes(window: int | None) -> dict[str, int]:
    """FlashAttention counts the keys before a query, and -1 is all of them."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def attention_reference(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The output in q's dtype, and lse [H, T]."""
    out = q_THd.new_empty(q_THd.shape)
    lse = torch.empty(q_THd.shape[1], q_THd.shape[0], dtype=wide_dtype(q_THd.dtype), device=q_THd.device)
    groups = k_TGd.shape[1]
    for start, n, length in _spans(layout, q_THd):
        tokens = slice(start, start + n * length)
        q, o = (x[tokens].view(n, length, groups, -1, x.shape[2]) for x in (q_THd, out))
        stats = lse[:, tokens].view(groups, -1, n, length)
        k, v = (_by_head(x[tokens], n) for x in (k_TGd, v_TGd))
        for i, j, first in _query_blocks(q_THd, length, n, window):
            s = _scores(_flat(q[:, i:j], scale), k[:, first:j], softcap)
            if j - first > 1:
                _by_query(s, j - i).masked_fill_(_hidden(j - i, j - first, window, s.device), -torch.inf)
            peak = s.amax(-1, keepdim=True)
            total = s.sub_(peak).exp_().sum(-1, keepdim=True)
            o[:, i:j] = _unflat(torch.bmm(s, v[:, first:j]).div_(total), n, j - i)
            stats[..., i:j] = _unflat(total.log_().add_(peak), n, j - i)[..., 0].permute(2, 3, 0, 1)
    return out, lse


def attention_backward_reference(
    dout_THd: Tensor,
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    out_THd: Tensor,
    lse_HT: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v."""
    dq_THd, dk_TGd, dv_TGd = (x.new_empty(x.shape) for x in (q_THd, k_TGd, v_TGd))
    groups = k_TGd.shape[1]
    for start, n, length in _spans(layout, q_THd):
        tokens = slice(start, start + n * length)
        do, q, o, dq = (x[tokens].view(n, length, groups, -1, x.shape[2]) for x in (dout_THd, q_THd, out_THd, dq_THd))
        stats = lse_HT[:, tokens].view(groups, -1, n, length).permute(2, 3, 0, 1)[..., None]
        k, v = (_by_head(x[tokens], n) for x in (k_TGd, v_TGd))
        dk, dv = (torch.zeros_like(x) for x in (k, v))
        for i, j, first in _query_blocks(q_THd, length, n, window):
            q_flat, do_flat = _flat(q[:, i:j], scale), _flat(do[:, i:j])
            delta = (do_flat * _flat(o[:, i:j])).sum(-1, keepdim=True)
            s = _scores(q_flat, k[:, first:j], softcap)
            slope = None if softcap is None else (s / softcap).square_().neg_().add_(1)
            p = s.sub_(_flat(stats[:, i:j])).exp_()
            if j - first > 1:
                _by_query(p, j - i).masked_fill_(_hidden(j - i, j - first, window, p.device), 0)
            ds = torch.bmm(do_flat, v[:, first:j].mT).sub_(delta).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dv[:, first:j].baddbmm_(p.mT, do_flat)
            dk[:, first:j].baddbmm_(ds.mT, q_flat)  # the scale is in q_flat
            dq[:, i:j] = _unflat(torch.bmm(ds, k[:, first:j]).mul_(scale), n, j - i)
        for given, found in ((dk_TGd, dk), (dv_TGd, dv)):
            given[tokens].view(n, length, groups, -1).copy_(found.view(n, groups, length, -1).transpose(1, 2))
    return dq_THd, dk_TGd, dv_TGd


def _spans(layout: Layout, q_THd: Tensor) -> Iterator[tuple[int, int, int]]:
    """Neighbours of one length that are worked on together, as (first token, documents, length)."""
    if layout.longest == 1:
        layout = Rows(q_THd.shape[0], 1)  # known without a look at the device
    lengths = layout.lengths
    if sum(lengths) != q_THd.shape[0]:
        raise ValueError(f"the layout holds {sum(lengths)} tokens and q {q_THd.shape[0]}")
    start = 0
    for length, group in groupby(lengths):
        left = len(list(group)) if length else 0
        most = max(1, _tile_size(q_THd) // (q_THd.shape[1] * min(length, QUERY_BLOCK) * max(length, 1))) if left else 1
        while left:
            n = min(left, most)
            yield start, n, length
            start, left = start + n * length, left - n


def _query_blocks(q_THd: Tensor, length: int, n: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Queries [i, j) of n documents whose scores fit a tile, and the first key that they see."""
    block = max(16, min(QUERY_BLOCK, _tile_size(q_THd) // (q_THd.shape[1] * n * length)))
    for i in range(0, length, block):
        yield i, min(i + block, length), 0 if window is None else max(0, i - window + 1)


def _tile_size(x: Tensor) -> int:
    """Scores a tile may hold."""
    return TILE_BYTES["cuda" if x.is_cuda else "cpu"] // 4


def _by_head(x: Tensor, n: int) -> Tensor:
    """[n L, G, d] -> [n G, L, d], accurate and contiguous."""
    x = x.view(n, -1, *x.shape[1:]).transpose(1, 2)
    return x.to(wide_dtype(x.dtype), memory_format=torch.contiguous_format).reshape(-1, *x.shape[2:])


def _flat(x: Tensor, factor: float | None = None) -> Tensor:
    """[n, b, G, r, d] -> [n G, r b, d], accurate: the queries that read one key head, as one matrix."""
    x = x.permute(0, 2, 3, 1, 4)
    x = x.to(wide_dtype(x.dtype)) if factor is None else x.to(wide_dtype(x.dtype)) * factor
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[4])


def _unflat(x: Tensor, n: int, b: int) -> Tensor:
    """[n G, r b, d] -> [n, b, G, r, d]"""
    return x.view(n, x.shape[0] // n, -1, b, x.shape[2]).permute(0, 3, 1, 2, 4)


def _by_query(s: Tensor, b: int) -> Tensor:
    """[n G, r b, m] -> [n G, r, b, m]"""
    return s.view(s.shape[0], -1, b, s.shape[2])


def _scores(q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    s = torch.bmm(q, k.mT)
    return s if softcap is None else s.div_(softcap).tanh_().mul_(softcap)


def _hidden(b: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """[b, m]: keys that the last b of m positions do not see."""
    hidden = torch.ones(b, m, dtype=torch.bool, device=device)
    if window is None:
        return hidden.triu_(m - b + 1)
    return hidden.triu(m - b + 1).logical_or_(hidden.tril_(m - b - window))
