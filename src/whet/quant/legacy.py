"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL: blocks of 32 weights, each with an fp16 scale of its own.

| format | bytes | a block's bytes                    | decoded                  |
|--------|-------|------------------------------------|--------------------------|
| Q8_0   | 34    | d, 32 int8 q                       | d * q                    |
| Q4_0   | 18    | d, 16 of nibbles                   | d * (q - 8)              |
| Q4_1   | 20    | d, m, 16 of nibbles                | d * q + m                |
| Q5_0   | 22    | d, 4 of fifth bits, 16 of nibbles  | d * (q - 16)             |
| Q5_1   | 24    | d, m, 4 of fifth bits, 16 nibbles  | d * q + m                |
| IQ4_NL | 18    | d, 16 of nibbles                   | d * CODEBOOK[q]          |

Weight i is in the low nibble of byte i, weight i + 16 in the high one; its fifth bit is bit i of a little-endian
32-bit number. Source: ggml's block_q8_0, block_q4_0 and so on.

Without importance the first five round to a scale that the block's largest weight, or its least and greatest, fix: the
same bytes as llama.cpp's. With importance, and always for IQ4_NL, the scale is searched (`symmetric`, `affine`).
Q8_0's scale is never searched.
Shapes: x float32 [n, 32]; h, the importance of a row's P blocks, [P, 32]; data uint8 [n, bytes].
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.quant.grids import CODEBOOK, Affine, Symmetric, Weighing
from whet.quant.kernels import Kernels
from whet.quant.packing import (
    half_bytes,
    half_values,
    pack_five_bits,
    pack_nibbles,
    round_to_half,
    unpack_five_bits,
    unpack_nibbles,
)

BLOCK_SIZE = 32


def encode_q8_0(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    """x ~ d * q, d = max|x| / 127. Importance changes nothing: a finer scale than this would clip."""
    return kernels.plain_int8(x)


def decode_q8_0(data: Tensor) -> Tensor:
    return half_values(data[:, :2])[:, None] * data[:, 2:].view(torch.int8).to(torch.float32)


# Q4_0 to Q5_1 are searched with importance only.
Q4_0_GRID = Symmetric(n=32, low=-8, high=7, trials=(-8, -7, -7.5, -8.5, -9, 7, 7.5, 8), weighing=Weighing.SUM)
Q5_0_GRID = Symmetric(n=32, low=-16, high=15, trials=(-16, -15, -15.5, -16.5, -17, 15, 15.5, 16), weighing=Weighing.SUM)
Q4_1_GRID = Affine(n=32, top=15, trials=(-1.5, -1, -0.5, 0.5, 1, 1.5), weighing=Weighing.SUM, below_zero=False)
Q5_1_GRID = Affine(n=32, top=31, trials=(-1.5, -1, -0.5, 0.5, 1, 1.5), weighing=Weighing.SUM, below_zero=False)
IQ4_NL_GRID = Symmetric(
    n=32,
    low=-127,
    high=113,
    trials=(-127, -137, -122, -117, -112, -107, 113, 108, 103),
    weighing=Weighing.SUM,
    codebook=True,
)


def encode_q4_0(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    if h is None:
        return kernels.plain_symmetric(x, 4)
    d, q = _symmetric(x, h, kernels, Q4_0_GRID)
    return torch.cat([half_bytes(d), pack_nibbles(q)], dim=1)


def decode_q4_0(data: Tensor) -> Tensor:
    q = unpack_nibbles(data[:, 2:]).to(torch.float32) - 8
    return half_values(data[:, :2])[:, None] * q


def encode_q5_0(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    if h is None:
        return kernels.plain_symmetric(x, 5)
    d, q = _symmetric(x, h, kernels, Q5_0_GRID)
    return torch.cat([half_bytes(d), pack_five_bits(q)], dim=1)


def decode_q5_0(data: Tensor) -> Tensor:
    q = unpack_five_bits(data[:, 2:]).to(torch.float32) - 16
    return half_values(data[:, :2])[:, None] * q


def encode_q4_1(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    if h is None:
        return kernels.plain_affine(x, 4)
    d, m, q = _affine(x, h, kernels, Q4_1_GRID)
    return torch.cat([half_bytes(d), half_bytes(m), pack_nibbles(q)], dim=1)


def decode_q4_1(data: Tensor) -> Tensor:
    q = unpack_nibbles(data[:, 4:]).to(torch.float32)
    return half_values(data[:, :2])[:, None] * q + half_values(data[:, 2:4])[:, None]


def encode_q5_1(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    if h is None:
        return kernels.plain_affine(x, 5)
    d, m, q = _affine(x, h, kernels, Q5_1_GRID)
    return torch.cat([half_bytes(d), half_bytes(m), pack_five_bits(q)], dim=1)


def decode_q5_1(data: Tensor) -> Tensor:
    q = unpack_five_bits(data[:, 4:]).to(torch.float32)
    return half_values(data[:, :2])[:, None] * q + half_values(data[:, 2:4])[:, None]


def encode_iq4_nl(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    d, q = _symmetric(x, h, kernels, IQ4_NL_GRID)
    return torch.cat([half_bytes(d), pack_nibbles(q)], dim=1)


def decode_iq4_nl(data: Tensor) -> Tensor:
    levels = torch.tensor(CODEBOOK, dtype=torch.float32, device=data.device)
    return half_values(data[:, :2])[:, None] * levels[unpack_nibbles(data[:, 2:]).to(torch.int64)]


def _symmetric(x: Tensor, h: Tensor | None, kernels: Kernels, grid: Symmetric) -> tuple[Tensor, Tensor]:
    d = round_to_half(kernels.symmetric_search(x, h, grid) + 0.0)  # never -0: which zero leads is up to the machine
    _, q = kernels.symmetric_levels(x, h, grid, d, torch.ones_like(d))
    return d, q


def _affine(x: Tensor, h: Tensor | None, kernels: Kernels, grid: Affine) -> tuple[Tensor, Tensor, Tensor]:
    scale, offset = kernels.affine_search(x, h, grid)
    d, m = round_to_half(scale + 0.0), round_to_half(offset + 0.0)
    one = torch.ones_like(d)
    _, _, q = kernels.affine_levels(x, h, grid, d, -m, one, one)
    return d, m, q
