"""Triton where it is installed. Without it the kernels' files still import, and every operation runs its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings triton along on Linux with CUDA, and nowhere else
    triton = tl = None

__all__ = ["HAVE_TRITON", "fused", "jit", "jit_for_any", "tl", "triton"]

HAVE_TRITON = triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is."""
    return triton.jit(function) if HAVE_TRITON else function


def jit_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit`, for arguments that differ at every call: a kernel compiled anew for each 1 and multiple of 16 is slow."""
    return lambda function: triton.jit(function, do_not_specialize=names) if HAVE_TRITON else function


def fused(x: Tensor) -> bool:
    """Whether the kernels take x: on a GPU with Triton, and not in fp64, which they would round."""
    return x.is_cuda and HAVE_TRITON and x.dtype != torch.float64
