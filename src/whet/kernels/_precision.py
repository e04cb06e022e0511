"""What the references compute in, fp32, or fp64 where they are given that; and a tensor in words."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def form(x: Tensor) -> str:
    """A tensor's dtype, shape, strides and device, for errors."""
    return f"{x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
