"""Levels and scales as bytes, and back. In torch, on any device; every tensor of codes is uint8, `n` blocks each."""

from __future__ import annotations

import torch
from torch import Tensor

F16_MAX = 65504.0


def half_bytes(x: Tensor) -> Tensor:
    """float32 [n] -> the bytes [n, 2] of its fp16 rounding, little-endian as GGUF stores it."""
    return x.to(torch.float16)[:, None].view(torch.uint8)


def half_values(data: Tensor) -> Tensor:
    """Bytes [n, 2] of little-endian fp16 -> float32 [n]."""
    return data.contiguous().view(torch.float16)[:, 0].to(torch.float32)


def round_to_half(x: Tensor) -> Tensor:
    """float32 rounded to what fp16 holds; magnitudes beyond its range to the end of it."""
    return x.clamp(-F16_MAX, F16_MAX).to(torch.float16).to(torch.float32)


def pack_nibbles(q: Tensor) -> Tensor:
    """[..., 2k] of 4 bits -> [..., k]: the first half in the low nibbles, the second in the high ones."""
    low, high = q.chunk(2, dim=-1)
    return low | high << 4


def unpack_nibbles(data: Tensor) -> Tensor:
    """[..., k] -> [..., 2k]: low nibbles, then high ones."""
    return torch.cat([data & 15, data >> 4], dim=-1)


def pack_fields(q: Tensor, bits: int) -> Tensor:
    """[..., F, k] -> [..., k]: field f of `bits` bits goes to bit f * bits."""
    packed = q[..., 0, :]
    for field in range(1, q.shape[-2]):
        packed = packed | q[..., field, :] << field * bits
    return packed


def unpack_fields(data: Tensor, bits: int) -> Tensor:
    """[..., k] -> [..., 8 / bits, k]."""
    return torch.stack([data >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], dim=-2)


def pack_five_bits(q: Tensor) -> Tensor:
    """[n, 32] of 5 bits -> [n, 20]: the fifth bits, eight a byte, and the nibbles."""
    fifth = (q >> 4).view(-1, 4, 8).transpose(1, 2)
    return torch.cat([pack_fields(fifth, 1), pack_nibbles(q & 15)], dim=1)


def unpack_five_bits(data: Tensor) -> Tensor:
    """[n, 20] -> [n, 32]."""
    fifth = unpack_fields(data[:, :4], 1).transpose(1, 2).reshape(-1, 32)
    return unpack_nibbles(data[:, 4:]) | fifth << 4
