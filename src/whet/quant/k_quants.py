"""Q2_K to Q6_K: super-blocks of 256 weights, whose blocks' scales are themselves rounded to a few bits.

| format | bytes | blocks  | decoded               | scales                                                    |
|--------|-------|---------|-----------------------|-----------------------------------------------------------|
| Q2_K   | 84    | 16 x 16 | d * sc * q - dmin * m | sc, m: 4 bits                                             |
| Q3_K   | 110   | 16 x 16 | d * sc * (q - 4)      | sc: 6 bits, stored plus 32                                |
| Q4_K   | 144   | 8 x 32  | d * sc * q - dmin * m | sc, m: 6 bits                                             |
| Q5_K   | 176   | 8 x 32  | d * sc * q - dmin * m | sc, m: 6 bits                                             |
| Q6_K   | 210   | 16 x 16 | d * sc * (q - 32)     | sc: int8                                                  |

d and dmin are fp16, one a super-block. How each lays out its bytes: its encoder's docstring. Source: ggml's block_q2_K
and so on. Encoders search scales by `affine` and `symmetric`, round them to multiples of d (and dmin), and search the
neighbours of the multiples.
Shapes: x float32 [n, 256]; h, the importance of a row's P super-blocks, [P, 256]; data uint8 [n, bytes].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from whet.quant.grids import Affine, Symmetric, Weighing
from whet.quant.importance import reciprocal
from whet.quant.kernels import Kernels
from whet.quant.packing import (
    half_bytes,
    half_values,
    pack_fields,
    pack_nibbles,
    round_to_half,
    unpack_fields,
    unpack_nibbles,
)

BLOCK_SIZE = 256
_CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))

Q2_K_GRID = Affine(
    n=16,
    top=3,
    trials=(-0.5, -0.25, 0.25, 0.5, 0.75, 1),
    guided_trials=(-0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1, 1.25, 1.5),
    weighing=Weighing.MAGNITUDE,
    guided=Weighing.IMPORTANCE,
    group=16,
    unit_top=15,
    steps=(*_CROSS, (-1, -1), (1, 1), (-1, 1), (1, -1)),
)
Q3_K_GRID = Symmetric(
    n=16,
    low=-4,
    high=3,
    trials=(-4, -3.5, 3.25),
    guided_trials=(-4, -3, -3.25, -3.5, -3.75, -4.25, -4.5, -5, 3, 3.25, 3.5, 4, 4.5),
    weighing=Weighing.SUM,
    group=16,
    unit_low=-32,
    unit_high=31,
    steps=(0, -1, 1),
)
Q4_K_GRID = Affine(
    n=32,
    top=15,
    trials=(-1, -0.5, 0.5, 1),
    guided_trials=(-1.5, -1, -0.5, 0.5, 1, 1.5),
    weighing=Weighing.SUM,
    group=8,
    unit_top=63,
    steps=_CROSS,
)
Q5_K_GRID = replace(Q4_K_GRID, top=31)
Q6_K_GRID = Symmetric(
    n=16,
    low=-32,
    high=31,
    trials=(-32, -30, -31, -33, -34, -35, 31, 30, 32),
    guided_trials=(-32, -31, -31.5, -32.5, -33, 31, 31.5),
    weighing=Weighing.SUM,
    guided=Weighing.IMPORTANCE,
    group=16,
    unit_low=-128,
    unit_high=127,
    steps=(0, -1, 1),
)


def encode_q2_k(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    """16 bytes sc | m << 4, 64 bytes of q, d, dmin. Of each half's 128 weights, four 32 apart share a byte."""
    d, dmin, sc, m, q = _affine(x, h, kernels, Q2_K_GRID)
    packed = pack_fields(q.view(-1, 2, 4, 32), 2).reshape(-1, 64)
    return torch.cat([sc | m << 4, packed, half_bytes(d), half_bytes(dmin)], dim=1)


def decode_q2_k(data: Tensor) -> Tensor:
    sc, m = data[:, :16] & 15, data[:, :16] >> 4
    q = unpack_fields(data[:, 16:80].reshape(-1, 2, 32), 2)
    return _affine_values(data[:, 80:82], data[:, 82:84], sc, m, q)


def encode_q3_k(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    """32 bytes of third bits, 64 bytes of the lower two (as Q2_K's), 12 bytes of sc, d."""
    d, sc, q = _symmetric(x, h, kernels, Q3_K_GRID)
    high = pack_fields((q >> 2).view(-1, 8, 32), 1)
    low = pack_fields((q & 3).view(-1, 2, 4, 32), 2).reshape(-1, 64)
    sc = (sc + 32).to(torch.uint8)
    sc_high = pack_fields((sc >> 4).view(-1, 4, 4), 2)
    return torch.cat([high, low, pack_nibbles(sc & 15), sc_high, half_bytes(d)], dim=1)


def decode_q3_k(data: Tensor) -> Tensor:
    high = unpack_fields(data[:, :32], 1).reshape(-1, 256)
    low = unpack_fields(data[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    sc_high = unpack_fields(data[:, 104:108], 2).reshape(-1, 16)
    sc = (unpack_nibbles(data[:, 96:104]) | sc_high << 4).to(torch.float32) - 32
    q = (low | high << 2).to(torch.float32) - 4
    return _symmetric_values(data[:, 108:110], sc, q)


def encode_q4_k(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    """d, dmin, 12 bytes of sc and m, 128 bytes of q: block 2i in the low nibbles of the i-th 32 bytes, 2i + 1 in the
    high ones."""
    d, dmin, sc, m, q = _affine(x, h, kernels, Q4_K_GRID)
    packed = pack_nibbles(q.view(-1, 4, 64)).reshape(-1, 128)
    return torch.cat([half_bytes(d), half_bytes(dmin), _pack_six_bits(sc, m), packed], dim=1)


def decode_q4_k(data: Tensor) -> Tensor:
    sc, m = _unpack_six_bits(data[:, 4:16])
    q = unpack_nibbles(data[:, 16:].reshape(-1, 4, 32))
    return _affine_values(data[:, :2], data[:, 2:4], sc, m, q)


def encode_q5_k(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: block j's are bit j of each."""
    d, dmin, sc, m, q = _affine(x, h, kernels, Q5_K_GRID)
    fifth = pack_fields((q >> 4).view(-1, 8, 32), 1)
    packed = pack_nibbles((q & 15).view(-1, 4, 64)).reshape(-1, 128)
    return torch.cat([half_bytes(d), half_bytes(dmin), _pack_six_bits(sc, m), fifth, packed], dim=1)


def decode_q5_k(data: Tensor) -> Tensor:
    sc, m = _unpack_six_bits(data[:, 4:16])
    fifth = unpack_fields(data[:, 16:48], 1).reshape(-1, 256)
    q = unpack_nibbles(data[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256) | fifth << 4
    return _affine_values(data[:, :2], data[:, 2:4], sc, m, q)


def encode_q6_k(x: Tensor, h: Tensor | None, kernels: Kernels) -> Tensor:
    """128 bytes of low nibbles, 64 bytes of high bit pairs, 16 bytes sc, d. Of each half's 128 weights, nibbles pair
    weight i with i + 64, and four weights 32 apart share a byte of bit pairs."""
    d, sc, q = _symmetric(x, h, kernels, Q6_K_GRID)
    low = pack_nibbles((q & 15).view(-1, 2, 128)).reshape(-1, 128)
    high = pack_fields((q >> 4).view(-1, 2, 4, 32), 2).reshape(-1, 64)
    return torch.cat([low, high, sc.to(torch.int8).view(torch.uint8), half_bytes(d)], dim=1)


def decode_q6_k(data: Tensor) -> Tensor:
    low = unpack_nibbles(data[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = unpack_fields(data[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    sc = data[:, 192:208].contiguous().view(torch.int8).to(torch.float32)
    return _symmetric_values(data[:, 208:210], sc, (low | high << 4).to(torch.float32) - 32)


def _affine(
    x: Tensor, h: Tensor | None, kernels: Kernels, grid: Affine
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, dmin [n]; sc, m uint8 [n, group]; q uint8 [n, 256]."""
    blocks, importance = x.view(-1, grid.n), None if h is None else h.reshape(-1, grid.n)
    scale, offset = kernels.affine_search(blocks, importance, grid)
    d, sc = _multiples_above_zero(scale.view(-1, grid.group), grid.unit_top)
    dmin, m = _multiples_above_zero(-offset.view(-1, grid.group), grid.unit_top)
    wide_d, wide_dmin = d.repeat_interleave(grid.group), dmin.repeat_interleave(grid.group)
    sc, m, q = kernels.affine_levels(blocks, importance, grid, wide_d, wide_dmin, sc.flatten(), m.flatten())
    return d, dmin, _codes(sc, grid.group), _codes(m, grid.group), q.view(-1, BLOCK_SIZE)


def _symmetric(x: Tensor, h: Tensor | None, kernels: Kernels, grid: Symmetric) -> tuple[Tensor, Tensor, Tensor]:
    """d [n]; sc float32 [n, group]; q uint8 [n, 256]."""
    blocks, importance = x.view(-1, grid.n), None if h is None else h.reshape(-1, grid.n)
    scale = kernels.symmetric_search(blocks, importance, grid).view(-1, grid.group) + 0.0  # never -0, as in legacy
    d, sc = _multiples(scale, grid.unit_low, grid.unit_high)
    sc, q = kernels.symmetric_levels(blocks, importance, grid, d.repeat_interleave(grid.group), sc.flatten())
    return d, sc.view(-1, grid.group), q.view(-1, BLOCK_SIZE)


def _multiples_above_zero(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Non-negative [n, group] -> the fp16 unit of each super-block [n], and multiples in [0, top] [n, group]."""
    unit = round_to_half(values.amax(1) * (1 / top))
    return unit, (values * reciprocal(unit)[:, None]).round_().clamp_(0, top)


def _multiples(values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """[n, group] -> the fp16 unit of each super-block [n], and multiples in [low, high] [n, group].

    The value of largest magnitude becomes `low`, the wider end, so the unit has the other sign.
    """
    least, greatest = values.aminmax(dim=1)
    widest = torch.where(greatest >= -least, greatest, least)
    unit = round_to_half(widest * (1 / low))
    return unit, (values * reciprocal(unit)[:, None]).round_().clamp_(low, high)


def _codes(x: Tensor, group: int) -> Tensor:
    return x.to(torch.uint8).view(-1, group)


def _affine_values(d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """d * sc * q - dmin * m from the parts of n super-blocks."""
    n, group = sc.shape
    scale = half_values(d)[:, None] * sc.to(torch.float32)
    offset = half_values(dmin)[:, None] * m.to(torch.float32)
    values = scale[:, :, None] * q.reshape(n, group, -1).to(torch.float32) - offset[:, :, None]
    return values.view(n, BLOCK_SIZE)


def _symmetric_values(d: Tensor, sc: Tensor, level: Tensor) -> Tensor:
    """d * sc * level from the parts of n super-blocks."""
    n, group = sc.shape
    scale = half_values(d)[:, None] * sc
    return (scale[:, :, None] * level.view(n, group, -1)).view(n, BLOCK_SIZE)


def _pack_six_bits(sc: Tensor, m: Tensor) -> Tensor:
    """[n, 8] and [n, 8] of 6 bits -> [n, 12]: the first four whole in the low bits; the last four split 4 + 2."""
    first = sc[:, :4] | sc[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    return torch.cat([first, second, (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4], dim=1)


def _unpack_six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 12] -> sc [n, 8], m [n, 8]."""
    first, second, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    sc = torch.cat([first & 63, (rest & 15) | first >> 6 << 4], dim=1)
    m = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], dim=1)
    return sc, m
