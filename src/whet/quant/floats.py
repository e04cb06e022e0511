"""F32, F16 and BF16: one number a weight, little-endian, rounded to nearest even. A "block" is one weight.

Shapes: x float32 [n, 1], data uint8 [n, bytes a weight].
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.quant.kernels import Kernels

F16_MAX_ABS = 65504.0
F32_MAX_ABS = torch.finfo(torch.float32).max
# The largest float32 that does not round up to infinity in bf16.
BF16_MAX_ABS = float.fromhex("0x1.fefffep127")


def encode_f32(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    return x.contiguous().view(torch.uint8)


def decode_f32(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float32)


def encode_f16(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    return x.to(torch.float16).view(torch.uint8)


def decode_f16(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).to(torch.float32)


def encode_bf16(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    return x.to(torch.bfloat16).view(torch.uint8)


def decode_bf16(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.bfloat16).to(torch.float32)
