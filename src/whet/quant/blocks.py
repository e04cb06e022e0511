"""What every block format shares: cutting rows into blocks, working through them in pieces that fit the cache, and
refusing numbers that a format cannot hold.

A block format stores a row of `cols` weights as `cols / block_size` blocks of `block_bytes` bytes each, in order.
Encoders work on a piece of blocks at a time and, inside it, transposed: `[block_size, blocks]`, so that sums over a
block and broadcasts to it run along contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from whet.errors import WhetError

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

# Weights a piece: 128 KiB of float32, so that the handful of arrays in use stay in a core's second-level cache.
_PIECE = 32_768


def encode_rows(
    x: FloatArray,
    name: str,
    block_size: int,
    block_bytes: int,
    max_abs: float,
    encode: Callable[[FloatArray], ByteArray],
) -> ByteArray:
    """Encode `x` [rows, cols] to [rows, cols / block_size * block_bytes] by `encode`: [n, block_size] -> bytes.

    Raises WhetError when `cols` is no multiple of `block_size`, or a weight is NaN, infinite, or above `max_abs`,
    the largest magnitude whose fp16 scales do not overflow.
    """
    rows, cols = x.shape
    if cols % block_size:
        raise WhetError(
            f"{name} stores rows in blocks of {block_size} weights; this tensor's rows have {cols}",
            fix=f"choose a type with smaller blocks, or pad the rows to a multiple of {block_size}",
        )
    blocks = np.ascontiguousarray(x, dtype=np.float32).reshape(-1, block_size)
    out = np.empty((blocks.shape[0], block_bytes), np.uint8)
    step = _PIECE // block_size
    for start in range(0, blocks.shape[0], step):
        piece = blocks[start : start + step]
        largest = float(np.abs(piece).max())
        if not largest <= max_abs:  # NaN compares false
            raise WhetError(
                f"a weight of magnitude {largest:g} does not fit {name}, which holds up to {max_abs:g}",
                fix="check the weights for NaN or overflow; f32 or bf16 hold every finite weight",
            )
        out[start : start + step] = encode(piece)
    return out.reshape(rows, -1)


def decode_rows(
    data: ByteArray, block_size: int, block_bytes: int, decode: Callable[[ByteArray], FloatArray]
) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols] by `decode`: [n, block_bytes] -> [n, block_size]."""
    blocks = np.ascontiguousarray(data).reshape(-1, block_bytes)
    out = np.empty((blocks.shape[0], block_size), np.float32)
    step = _PIECE // block_size
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(data.shape[0], -1)


def fp16_bytes(x: FloatArray) -> ByteArray:
    """[n] float32 -> [n, 2] bytes of its fp16 rounding, little-endian as GGUF stores it."""
    return x.astype("<f2").view(np.uint8).reshape(-1, 2)


def fp16_values(data: ByteArray) -> FloatArray:
    """[n, 2] bytes of little-endian fp16 -> [n] float32."""
    return np.ascontiguousarray(data).view("<f2").reshape(-1).astype(np.float32)


def reciprocal(x: FloatArray) -> FloatArray:
    """1 / x, and 0 where x is 0 or so small that 1 / x overflows: such a scale stands for a block of zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / x
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
