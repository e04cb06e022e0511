"""Q8_0: blocks of 32 weights, x ~ d * q, with q in [-127, 127] and d = max|x| / 127 in fp16. 8.5 bits a weight.

Block, 34 bytes: d (fp16), q (32 int8). Source: ggml's block_q8_0. The encoder is gguf's own, which matches ggml's
reference bit for bit.
Shapes: x float32 [rows, cols], data uint8 [rows, cols / 32 * 34].
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from whet.quant.blocks import ByteArray, FloatArray, decode_rows, encode_rows, fp16_values

BLOCK_SIZE, BLOCK_BYTES = 32, 34
MAX_ABS = 127 * 65504.0
_NEGLIGIBLE = np.float32(2.0**-100)


def encode(x: FloatArray) -> ByteArray:
    """Encode [rows, cols] to Q8_0. Raises WhetError as `encode_rows` does."""
    return encode_rows(x, "q8_0", BLOCK_SIZE, BLOCK_BYTES, MAX_ABS, _encode_blocks)


def decode(data: ByteArray) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols]."""
    return decode_rows(data, BLOCK_SIZE, BLOCK_BYTES, _decode_blocks)


def _encode_blocks(x: FloatArray) -> ByteArray:
    # Numbers so small that 1 / d would overflow: every fp16 scale turns them into zero anyway.
    return quantize(np.where(np.abs(x) < _NEGLIGIBLE, np.float32(0), x), GGMLQuantizationType.Q8_0)


def _decode_blocks(data: ByteArray) -> FloatArray:
    d = fp16_values(data[:, :2])[:, None]
    return np.ascontiguousarray(data[:, 2:]).view(np.int8).astype(np.float32) * d
