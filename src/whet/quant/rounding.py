"""The legacy formats' plain rounding: a block's extremes fix its scale, nothing is searched. In torch, on any device.

Each gives the bytes that llama.cpp's quantizer gives, and `rounding_cpu` is the same compiled. 1 / d is 0 where d is
negligible: llama.cpp divides by any d, and what it then stores decodes to zeros as well. A d or m of 0 has the sign
that llama.cpp gives it where all weights are 0.
Shapes: x float32 [n, 32] to uint8 [n, bytes]: d, m where there is one, and the levels as `legacy` lays them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from whet.quant.importance import reciprocal
from whet.quant.packing import half_bytes, pack_five_bits, pack_nibbles

# float32's largest number below 0.5. Added before truncation it rounds halves away from zero, and nothing else up.
BELOW_HALF = 0.49999997


def largest(x: Tensor) -> float:
    """The largest magnitude in x; NaN where there is one."""
    least, greatest = x.aminmax()
    return max(-float(least), float(greatest))


def plain_int8(x: Tensor) -> Tensor:
    """x ~ d * q with d = max|x| / 127."""
    d = _divide(x.abs().amax(1), 127)  # never -0
    v = x * reciprocal(d)[:, None]
    q = (v + torch.full_like(v, BELOW_HALF).copysign_(v)).to(torch.int8)
    return torch.cat([half_bytes(d), q.view(torch.uint8)], dim=1)


def plain_symmetric(x: Tensor, bits: int) -> Tensor:
    """x ~ d * (q - half), the weight of largest magnitude, the first of several, at q = 0. bits: 4 or 5."""
    half = 1 << bits - 1
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
    d = _divide(extreme, -half)
    d = torch.where(d == 0, -0.0, d)
    q = (x * reciprocal(d)[:, None] + (half + 0.5)).clamp_(max=2 * half - 1).to(torch.uint8)
    packed = pack_nibbles(q) if bits == 4 else pack_five_bits(q)
    return torch.cat([half_bytes(d), packed], dim=1)


def plain_affine(x: Tensor, bits: int) -> Tensor:
    """x ~ d * q + m, the least weight at q = 0 and the greatest at the top. bits: 4 or 5."""
    top = (1 << bits) - 1
    m, greatest = x.aminmax(dim=1)
    m = torch.where(m == 0, 0.0, m)  # of two zeros, which is least is up to the machine
    d = _divide(greatest - m, top)
    d = torch.where(d == 0, 0.0, d)
    q = ((x - m[:, None]) * reciprocal(d)[:, None] + 0.5).clamp_(max=top).to(torch.uint8)
    packed = pack_nibbles(q) if bits == 4 else pack_five_bits(q)
    return torch.cat([half_bytes(d), half_bytes(m), packed], dim=1)


def _divide(x: Tensor, by: int) -> Tensor:
    """x / by, rounded once. CUDA multiplies by the reciprocal of a Python number instead."""
    return x / torch.full_like(x, by)
