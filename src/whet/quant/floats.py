"""F32, F16 and BF16: one number a weight, little-endian. A "block" is one weight.

Shapes: x float32 [rows, cols], data uint8 [rows, cols * bytes a weight].
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from whet.quant.blocks import ByteArray, FloatArray, encode_rows

F16_MAX_ABS = 65504.0
F32_MAX_ABS = float(np.finfo(np.float32).max)
# The largest float32 that does not round up to infinity in bf16.
BF16_MAX_ABS = float(np.uint32(0x7F7F7FFF).view(np.float32))


def encode_f32(x: FloatArray) -> ByteArray:
    """Encode [rows, cols] as it is. Raises WhetError for NaN and infinity."""
    return encode_rows(x, "f32", 1, 4, F32_MAX_ABS, lambda piece: piece.astype("<f4").view(np.uint8))


def decode_f32(data: ByteArray) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols]."""
    return np.ascontiguousarray(data).view("<f4").astype(np.float32)


def encode_f16(x: FloatArray) -> ByteArray:
    """Encode [rows, cols] to fp16. Raises WhetError above 65504, and for NaN."""
    return encode_rows(x, "f16", 1, 2, F16_MAX_ABS, lambda piece: piece.astype("<f2").view(np.uint8))


def decode_f16(data: ByteArray) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols]."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def encode_bf16(x: FloatArray) -> ByteArray:
    """Encode [rows, cols] to bf16, to nearest even. Raises WhetError for NaN and infinity."""
    return encode_rows(x, "bf16", 1, 2, BF16_MAX_ABS, lambda piece: quantize(piece, GGMLQuantizationType.BF16))


def decode_bf16(data: ByteArray) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols]."""
    return (np.ascontiguousarray(data).view("<u2").astype(np.uint32) << 16).view(np.float32)
