"""Attention as kernel_speed.py measures it: torch's back ends, FlashAttention 4, and the kernels for soft caps.

Rows of one length, and documents as they are packed. Shapes: see kernel_work.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_work import Device, Missing, Sizes, Work, unallocated
from torch import Tensor

SOFTCAP = 50.0  # Gemma 2's


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


def bounds(documents: Any) -> tuple[Tensor | None, int]:
    """Where documents begin, None for rows, and the longest."""
    return getattr(documents, "cu_seqlens", None), documents.longest


def product_flops(s: Sizes, lengths: list[int]) -> int:
    """Of one of attention's products: d multiplications and additions a head and pair of query and visible key."""
    return 2 * s.d * s.H * sum(length * (length + 1) // 2 for length in lengths)


def by_torch(run: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """What `run` does where FlashAttention 4 is not installed."""
    from whet.kernels import attention as module

    takes, module.flash4_takes = module.flash4_takes, lambda *_: False
    try:
        return run(*given, **options)
    finally:
        module.flash4_takes = takes


def attention(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.attention import attention

    qkv, documents = heads(s, on, sum(lengths)), layout(s, on, lengths)
    run = partial(by_torch, attention, *qkv, documents, scale=s.d**-0.5)
    out, saved = run()
    return Work(run, qkv, [unallocated(out), unallocated(saved[0])], 2 * product_flops(s, lengths))


def attention_backward(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.attention import attention, attention_backward

    qkv, documents = heads(s, on, sum(lengths)), layout(s, on, lengths)
    out, saved = by_torch(attention, *qkv, documents, scale=s.d**-0.5)
    dout = on.normal(*out.shape)
    run = partial(by_torch, attention_backward, dout, *qkv, out, saved, documents, scale=s.d**-0.5)
    return Work(run, [dout, *qkv, out, saved[0]], [unallocated(x) for x in qkv], 5 * product_flops(s, lengths))


def flash4(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.flash4 import flash4

    qkv, given = heads(s, on, sum(lengths)), bounds(layout(s, on, lengths))
    run = partial(flash4, *qkv, *given, scale=s.d**-0.5, window=None)
    return Work(run, qkv, [unallocated(x) for x in run()], 2 * product_flops(s, lengths), host_bound=True)


def flash4_backward(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.flash4 import flash4, flash4_backward

    qkv, given = heads(s, on, sum(lengths)), bounds(layout(s, on, lengths))
    options = {"scale": s.d**-0.5, "window": None}
    out, lse = flash4(*qkv, *given, **options)
    dout = on.normal(*out.shape)
    run = partial(flash4_backward, dout, *qkv, out, lse, *given, **options)
    written = [unallocated(x) for x in qkv]
    return Work(run, [dout, *qkv, out, lse], written, 5 * product_flops(s, lengths), host_bound=True)


def flash(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.flash import flash_triton

    qkv, given = heads(s, on, sum(lengths)), bounds(layout(s, on, lengths))
    run = partial(flash_triton, *qkv, *given, scale=s.d**-0.5, softcap=SOFTCAP)
    return Work(run, qkv, [unallocated(x) for x in run()], 2 * product_flops(s, lengths))


def flash_backward(s: Sizes, on: Device, lengths: list[int]) -> Work:
    from whet.kernels.flash import flash_backward_triton, flash_triton

    qkv, given = heads(s, on, sum(lengths)), bounds(layout(s, on, lengths))
    options = {"scale": s.d**-0.5, "softcap": SOFTCAP}
    out, lse = flash_triton(*qkv, *given, **options)
    dout = on.normal(*out.shape)
    run = partial(flash_backward_triton, dout, *qkv, out, lse, *given, **options)
    return Work(run, [dout, *qkv, out, lse], [unallocated(x) for x in qkv], 5 * product_flops(s, lengths))


def needs_flash4(on: Device) -> None:
    """Elsewhere others run, which have lines of their own."""
    from whet.kernels.flash4 import takes

    if not (torch.cuda.is_available() and takes(on.empty(1, 1, 128), torch.cuda.get_device_capability())):
        raise Missing("FlashAttention 4 is called on Hopper, and where whet[flash4] is installed")
