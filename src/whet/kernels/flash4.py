"""FlashAttention 4 on Hopper, where it is installed (`pip install "whet[flash4]"`). What it computes: attention.py.

Its kernels are written in CuTe DSL and compiled when first used, three seconds each. Compiled ones are kept in the
user's cache folder, by its own means, so that later processes only read them; importing it takes seconds all the same,
and `prepare` has a thread do that while a trainer is made. It is a beta, of which one version is called, by functions
that are not its public ones: autograd's are of no use to a block that keeps its own backward.

Source: https://github.com/Dao-AILab/flash-attention, flash_attn/cute; Shah et al. 2024, arXiv:2407.08608.
Shapes: q, out [T, H, d]; k, v [T, G, d], as in flash.py; lse [H, T], or [B, H, S] of B rows of S tokens. Any strides
that are multiples of 8, with the last dimension contiguous. cu_seqlens [N + 1] int32, or None for rows of `longest`
tokens, which it takes as [B, S, ..].
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

from whet.kernels._choices import folder

log = logging.getLogger("whet")

PACKAGE, VERSION = "flash-attn-4", "4.0.0b36"
MODULE = "flash_attn.cute.interface"
MOST_WIDE = 256

_lock = Lock()
_loaded: list[Any] = []


@cache
def installed() -> bool:
    """Whether the version that is called here is installed. Says so where it is another one."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        return False
    if found != VERSION:
        log.warning(
            "%s %s is installed, of which whet calls %s: attention runs without it (pip install %s==%s)",
            PACKAGE, found, VERSION, PACKAGE, VERSION,
        )  # fmt: skip
    return found == VERSION


def prepare() -> Thread | None:
    """Import it in a thread where this GPU has kernels of it: the first step then need not wait. Says if it lacks."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    if not installed():
        log.info('attention would be faster here with FlashAttention 4: pip install "whet[flash4]"')
        return None
    thread = Thread(target=interface, name="whet-flash4", daemon=True)
    thread.start()
    return thread


def interface() -> Any:
    """Its module; None where it can't be imported, which is said once. Waits while another thread imports it.

    It reads where compiled kernels are kept once, when it is imported; what the user has set stays.
    """
    with _lock:
        if not _loaded:
            _loaded.append(_import())
        return _loaded[0]


def _import() -> Any:
    try:
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder() / "flash4"))
        warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted to a JitArgument")
        return import_module(MODULE)
    except Exception as error:  # its libraries have errors of their own for what they miss
        log.warning("FlashAttention 4 can't be loaded, attention runs without it: %s: %s", type(error).__name__, error)
        return None


def takes(q: Tensor, capability: tuple[int, int]) -> bool:
    """Whether it computes attention of q [T, H, d], in 16 bits and without a soft cap, on a GPU like this."""
    return capability[0] == 9 and q.shape[2] % 8 == 0 and q.shape[2] <= MOST_WIDE and installed() and bool(interface())


def flash4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, longest: int, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    rows = (_by_row(x, cu_seqlens, longest) for x in (q, k, v))
    options = _options(cu_seqlens, longest, scale, window)
    out, lse, *_ = interface()._flash_attn_fwd(*rows, **options, return_lse=True)
    return out.view(q.shape), lse


def flash4_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. Their sums are taken in no fixed order, so that they differ in the last bits from call to call."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dout, out, q, k, v, *given = (_by_row(x, cu_seqlens, longest) for x in (dout, out, q, k, v, dq, dk, dv))
    into = dict(zip(("dq", "dk", "dv"), given, strict=True))
    interface()._flash_attn_bwd(q, k, v, out, dout, lse, **_options(cu_seqlens, longest, scale, window), **into)
    return dq, dk, dv


def _by_row(x: Tensor, cu_seqlens: Tensor | None, longest: int) -> Tensor:
    return x.view(-1, longest, *x.shape[1:]) if cu_seqlens is None else x


def _options(cu_seqlens: Tensor | None, longest: int, scale: float, window: int | None) -> dict[str, Any]:
    """Its arguments for this layout. A window counts the keys before the query's own."""
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window is not None:
        options |= {"window_size_left": window - 1, "window_size_right": 0}
    if cu_seqlens is not None:
        options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return options
