"""`rounding`, compiled: the same bytes, at the speed of memory. One block after the other, since nothing is summed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whet.quant.rounding import BELOW_HALF
from whet.quant.tiles import ONE, TINY, ZERO, Bytes, Floats, jit_with

# Lets the least and greatest of a block be found in vectors. What is encoded holds no NaN; that was checked. Which sign
# a zero gets is then up to the compiler, so scales of 0 are set afterwards.
_jit = jit_with(fastmath={"nnan", "nsz"})
_BELOW_HALF, _HALF = np.float32(BELOW_HALF), np.float32(0.5)
_FIFTEEN, _SIXTEEN = np.float32(15), np.float32(16)
_GATHER = np.uint64(0x0102040810204080)


def plain_int8(x: Tensor) -> Tensor:
    """As `rounding.plain_int8`, on the CPU."""
    d, out = np.empty(x.shape[0], np.float32), np.empty((x.shape[0], 34), np.uint8)
    _int8(x.numpy(), d, out.view(np.int8))
    d[d == 0] = ZERO
    return _with_halves(out, d)


def plain_symmetric(x: Tensor, bits: int) -> Tensor:
    """As `rounding.plain_symmetric`, on the CPU."""
    d, out = np.empty(x.shape[0], np.float32), np.empty((x.shape[0], 2 + _payload_bytes(bits)), np.uint8)
    _symmetric(x.numpy(), 1 << bits - 1, d, out)
    d[d == 0] = -ZERO
    return _with_halves(out, d)


def plain_affine(x: Tensor, bits: int) -> Tensor:
    """As `rounding.plain_affine`, on the CPU."""
    d, m = np.empty(x.shape[0], np.float32), np.empty(x.shape[0], np.float32)
    out = np.empty((x.shape[0], 4 + _payload_bytes(bits)), np.uint8)
    _affine(x.numpy(), (1 << bits) - 1, d, m, out)
    for scale in (d, m):
        scale[scale == 0] = ZERO
    return _with_halves(out, d, m)


def _payload_bytes(bits: int) -> int:
    return 16 if bits == 4 else 20


def _with_halves(out: Bytes, *scales: Floats) -> Tensor:
    """The blocks, with their scales written in front in fp16."""
    encoded = torch.from_numpy(out)
    for i, scale in enumerate(scales):
        encoded.view(torch.float16)[:, i] = torch.from_numpy(scale)
    return encoded


@_jit
def _range(x: Floats, block: int) -> tuple[np.float32, np.float32]:
    low, high = x[block, 0], x[block, 0]
    for i in range(32):
        low = min(low, x[block, i])
        high = max(high, x[block, i])
    return low, high


@_jit
def _inverse(d: np.float32) -> np.float32:
    inverse: np.float32 = ONE / d if abs(d) > TINY else ZERO
    return inverse


@_jit
def _int8(x: Floats, d: Floats, out: NDArray[np.int8]) -> None:
    for block in range(x.shape[0]):
        low, high = _range(x, block)
        d[block] = max(high, -low) / np.float32(127)
        inverse = _inverse(d[block])
        for i in range(32):
            v = x[block, i] * inverse
            out[block, 2 + i] = np.int8(v + (_BELOW_HALF if v > ZERO else -_BELOW_HALF))


@_jit
def _first_extreme(x: Floats, block: int) -> np.float32:
    """The weight of largest magnitude; the first, where there are two with different signs."""
    low, high = _range(x, block)
    if high == -low:
        for i in range(32):
            if x[block, i] == high or x[block, i] == low:
                first: np.float32 = x[block, i]
                return first
    return high if high > -low else low


@_jit
def _symmetric(x: Floats, half: int, d: Floats, out: Bytes) -> None:
    shift, top = np.float32(half) + _HALF, np.float32(2 * half - 1)
    fifth = np.empty(4, np.uint64)
    for block in range(x.shape[0]):
        d[block] = _first_extreme(x, block) / np.float32(-half)
        _pack(x, block, ZERO, _inverse(d[block]), shift, top, fifth, out, 2)


@_jit
def _affine(x: Floats, top: int, d: Floats, m: Floats, out: Bytes) -> None:
    fifth = np.empty(4, np.uint64)
    for block in range(x.shape[0]):
        low, high = _range(x, block)
        m[block] = low
        d[block] = (high - low) / np.float32(top)
        _pack(x, block, low, _inverse(d[block]), _HALF, np.float32(top), fifth, out, 4)


@_jit
def _pack(
    x: Floats,
    block: int,
    zero: np.float32,
    inverse: np.float32,
    shift: np.float32,
    top: np.float32,
    fifth: NDArray[np.uint64],
    out: Bytes,
    start: int,
) -> None:
    """Levels min((x - zero) * inverse + shift, top), truncated, as nibbles from byte `start` of a block on; where `top`
    takes five bits, after four bytes of fifth bits. fifth: scratch, a byte a weight.

    Nibbles are put together as float32, which holds them exactly: numba's integers would be 64 bits wide.
    """
    if top <= _FIFTEEN:
        for i in range(16):
            low = np.floor(min((x[block, i] - zero) * inverse + shift, top))
            high = np.floor(min((x[block, i + 16] - zero) * inverse + shift, top))
            out[block, start + i] = np.uint8(np.int32(low + _SIXTEEN * high))
        return
    bits = fifth.view(np.uint8)
    for i in range(16):
        low = np.floor(min((x[block, i] - zero) * inverse + shift, top))
        high = np.floor(min((x[block, i + 16] - zero) * inverse + shift, top))
        low_bit = ONE if low > _FIFTEEN else ZERO
        high_bit = ONE if high > _FIFTEEN else ZERO
        bits[i] = np.uint8(np.int32(low_bit))
        bits[i + 16] = np.uint8(np.int32(high_bit))
        nibbles = low - _SIXTEEN * low_bit + _SIXTEEN * (high - _SIXTEEN * high_bit)
        out[block, start + 4 + i] = np.uint8(np.int32(nibbles))
    for byte in range(4):  # a product gathers eight bits, one a byte, in its top byte
        out[block, start + byte] = np.uint8(fifth[byte] * _GATHER >> np.uint64(56))
