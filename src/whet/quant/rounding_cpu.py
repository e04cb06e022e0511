"""`rounding`, compiled: the same bytes, at the speed of memory. Three passes over a piece: ranges, scales, levels.

Every inner loop becomes vector instructions. For that its length is read from a shape: LLVM unrolls a short loop of
constant length, and then finds no loop to vectorize. Columns of `out` are counted in unsigned numbers: a signed one
could be negative, and each step would ask. A block's range is found in integers: LLVM vectorizes the least of floats
only where it may ignore NaN, and numba cannot say so of what `min` compiles to.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whet.quant.rounding import BELOW_HALF
from whet.quant.tiles import ONE, TINY, ZERO, Bytes, Floats, helper, jit

_Ints = NDArray[np.int32]
_Halves = NDArray[np.uint16]
_HALF, _BELOW_HALF = np.float32(0.5), np.float32(BELOW_HALF)
_MAGNITUDE, _SIGN_SHIFT, _LEAST = np.int32(0x7FFFFFFF), np.int32(31), np.int32(-0x80000000)
_NIBBLE, _NIBBLE_BITS = np.int32(15), np.int32(4)
_GATHER, _TOP_BYTE = np.uint64(0x0102040810204080), np.uint64(56)
# fp16: its smallest normal number and its sign, what its exponent and its fraction lack of float32's, half a step.
_NORMAL, _SIGN, _EXPONENTS = np.float32(2.0**-14), np.int32(0x8000), np.int32(112 << 23)
_HALF_BITS, _DROPPED, _HALF_STEP = np.int32(0x3F000000), np.int32(13), np.int32(0xFFF)


def largest(x: Tensor) -> float:
    """As `rounding.largest`, on the CPU."""
    return float(_largest(x.numpy().reshape(-1).view(np.int32)))


def plain_int8(x: Tensor) -> Tensor:
    """As `rounding.plain_int8`, on the CPU."""
    weights, out = x.numpy(), np.empty((x.shape[0], 34), np.uint8)
    low, high = _range(weights)
    _int8_scales(low, high, out.view(np.uint16))
    _write_int8(weights, high, out.view(np.int8), np.uint64(2))
    return torch.from_numpy(out)


def plain_symmetric(x: Tensor, bits: int) -> Tensor:
    """As `rounding.plain_symmetric`, on the CPU."""
    weights, out = x.numpy(), np.empty((x.shape[0], 2 + 4 * bits), np.uint8)
    half = 1 << bits - 1
    low, high = _range(weights)
    _symmetric_scales(weights, low, high, np.float32(-half), out.view(np.uint16))
    _write_levels(weights, np.zeros_like(low), high, half + 0.5, 2 * half - 1, out, 2)
    return torch.from_numpy(out)


def plain_affine(x: Tensor, bits: int) -> Tensor:
    """As `rounding.plain_affine`, on the CPU."""
    weights, out = x.numpy(), np.empty((x.shape[0], 4 + 4 * bits), np.uint8)
    top = (1 << bits) - 1
    low, high = _range(weights)
    _affine_scales(low, high, np.float32(top), out.view(np.uint16))
    _write_levels(weights, low, high, 0.5, top, out, 4)
    return torch.from_numpy(out)


def _range(x: Floats) -> tuple[Floats, Floats]:
    """The least and the greatest weight of each block."""
    low, high = np.empty(x.shape[0], np.float32), np.empty(x.shape[0], np.float32)
    _find_range(x.view(np.int32), low.view(np.int32), high.view(np.int32))
    return low, high


def _write_levels(x: Floats, zero: Floats, d: Floats, shift: float, top: int, out: Bytes, start: int) -> None:
    """Levels min((x - zero) / d + shift, top), truncated, to the bytes of `out` from `start` on."""
    arguments = x, zero, d, np.float32(shift), np.float32(top), out
    if top > 15:
        fifth = np.empty(x.shape[1], np.uint8)
        _write_fifth_bits(*arguments, np.uint64(start), fifth, fifth.view(np.uint64))
        start += 4
    _write_nibbles(*arguments, np.uint64(start))


@jit
def _largest(bits: _Ints) -> np.float32:
    """Of numbers' bits: NaN's are above infinity's."""
    found = np.int32(0)
    for i in range(bits.shape[0]):
        found = max(found, np.int32(bits[i] & _MAGNITUDE))
    return np.int32(found).view(np.float32)


@helper
def _in_order(bits: np.int32) -> np.int32:
    """float32's bits to an integer that orders as the number does, and back: below 0 a larger magnitude is less."""
    return np.int32(bits ^ (bits >> _SIGN_SHIFT & _MAGNITUDE))


@jit
def _find_range(bits: _Ints, low: _Ints, high: _Ints) -> None:
    for block in range(bits.shape[0]):
        least, greatest = _MAGNITUDE, _LEAST
        for i in range(bits.shape[1]):
            value = _in_order(bits[block, i])
            least, greatest = min(least, value), max(greatest, value)
        low[block] = _in_order(least)
        high[block] = _in_order(greatest)


@helper
def _half(x: np.float32) -> np.uint16:
    """The bits of x in fp16, rounded to nearest even; |x| below 65520."""
    bits = np.float32(x).view(np.int32)  # numba views what it sees a type around
    magnitude = bits & _MAGNITUDE
    even = magnitude >> _DROPPED & np.int32(1)
    rounded = magnitude - _EXPONENTS + even + _HALF_STEP >> _DROPPED
    # The sum's last bit counts in fp16's smallest steps.
    small = np.float32(abs(x) + _HALF).view(np.int32) - _HALF_BITS
    return np.uint16((small if abs(x) < _NORMAL else rounded) | bits >> np.int32(16) & _SIGN)


# Each puts d in `high`, for the levels. A zero is added where it makes a 0 positive.
@jit
def _int8_scales(low: Floats, high: Floats, halves: _Halves) -> None:
    for block in range(low.shape[0]):
        high[block] = max(high[block], -low[block]) / np.float32(127) + ZERO
        halves[block, 0] = _half(high[block])


@jit
def _symmetric_scales(x: Floats, low: Floats, high: Floats, least_level: np.float32, halves: _Halves) -> None:
    """The weight of largest magnitude is at the least level: the first one, where two have different signs."""
    for block in range(low.shape[0]):
        extreme = high[block] if high[block] > -low[block] else low[block]
        if high[block] == -low[block]:
            i = 0
            while abs(x[block, i]) != high[block]:
                i += 1
            extreme = x[block, i]
        high[block] = -(ZERO - extreme / least_level)  # a 0 is negative
        halves[block, 0] = _half(high[block])


@jit
def _affine_scales(low: Floats, high: Floats, top: np.float32, halves: _Halves) -> None:
    for block in range(low.shape[0]):
        low[block] += ZERO
        high[block] = (high[block] - low[block]) / top + ZERO
        halves[block, 0] = _half(high[block])
        halves[block, 1] = _half(low[block])


@helper
def _inverse(d: np.float32) -> np.float32:
    inverse: np.float32 = ONE / d if abs(d) > TINY else ZERO
    return inverse


@jit
def _write_int8(x: Floats, d: Floats, out: NDArray[np.int8], start: np.uint64) -> None:
    for block in range(x.shape[0]):
        inverse = _inverse(d[block])
        for i in range(x.shape[1]):
            v = x[block, i] * inverse
            out[block, start + np.uint64(i)] = np.int8(v + (_BELOW_HALF if v > ZERO else -_BELOW_HALF))


@helper
def _level(x: np.float32, zero: np.float32, inverse: np.float32, shift: np.float32, top: np.float32) -> np.int32:
    return np.int32(min((x - zero) * inverse + shift, top))


@jit
def _write_nibbles(
    x: Floats, zero: Floats, d: Floats, shift: np.float32, top: np.float32, out: Bytes, start: np.uint64
) -> None:
    half = x.shape[1] >> 1
    for block in range(x.shape[0]):
        least, inverse = zero[block], _inverse(d[block])
        for i in range(half):
            low = _level(x[block, i], least, inverse, shift, top)
            high = _level(x[block, half + i], least, inverse, shift, top)
            out[block, start + np.uint64(i)] = np.uint8(low & _NIBBLE | high << _NIBBLE_BITS)


@jit
def _write_fifth_bits(
    x: Floats,
    zero: Floats,
    d: Floats,
    shift: np.float32,
    top: np.float32,
    out: Bytes,
    start: np.uint64,
    fifth: Bytes,
    words: NDArray[np.uint64],
) -> None:
    """fifth: scratch, a byte a weight, and `words` the same bytes. A product gathers the lowest bits of eight bytes in
    its top byte."""
    for block in range(x.shape[0]):
        least, inverse = zero[block], _inverse(d[block])
        for i in range(x.shape[1]):
            fifth[i] = np.uint8(_level(x[block, i], least, inverse, shift, top) >> _NIBBLE_BITS)
        for i in range(words.shape[0]):
            out[block, start + np.uint64(i)] = np.uint8(words[i] * _GATHER >> _TOP_BYTE)
