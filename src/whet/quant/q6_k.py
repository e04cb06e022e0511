"""Q6_K: super-blocks of 256 weights in 16 blocks of 16, x ~ d * sc * q. 6.5625 bits a weight.

q is 6 bits a weight in [-32, 31], stored plus 32; sc is int8, one a block; d is fp16, one a super-block.
Super-block, 210 bytes: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 bytes sc, d. Within each half of 128
weights, low nibbles pair weight i with i + 64, and bit pairs gather weights i, i + 32, i + 64 and i + 96. Source:
ggml's block_q6_K.

The encoder makes sum w * (a * q - x)^2 small over each block, importance w = x^2, by a grid of trial scales that put
the block's largest weight near -32 (the wider side), each followed by the least-squares a for its q. Scales are then
rounded to int8 multiples of d, and q is taken again from the rounded scale.
Shapes: x float32 [rows, cols], data uint8 [rows, cols / 256 * 210]. Inside: B blocks, arrays [16, B] and [B].
"""

from __future__ import annotations

import numpy as np

from whet.quant.blocks import ByteArray, FloatArray, decode_rows, encode_rows, fp16_bytes, fp16_values, reciprocal

BLOCK_SIZE, BLOCK_BYTES = 256, 210
MAX_ABS = 30 * 127 * 65504.0  # d = max|x| / 32 / 128 must fit fp16, with room for the search

# Trial scales: the largest weight at -(32 + t).
_TRIALS = np.arange(-2, 4, 0.25, dtype=np.float32)


def encode(x: FloatArray) -> ByteArray:
    """Encode [rows, cols] to Q6_K. Raises WhetError as `encode_rows` does."""
    return encode_rows(x, "q6_k", BLOCK_SIZE, BLOCK_BYTES, MAX_ABS, _encode_blocks)


def decode(data: ByteArray) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols]."""
    return decode_rows(data, BLOCK_SIZE, BLOCK_BYTES, _decode_blocks)


def _levels(x: FloatArray, inverse_scale: FloatArray) -> FloatArray:
    q = x * inverse_scale
    np.rint(q, out=q)
    return np.clip(q, -32, 31, out=q)


def _search(x_16B: FloatArray) -> FloatArray:
    """The best scale [B] of each block, before it is rounded to int8; its sign is the largest weight's, negated."""
    extreme = np.where(x_16B.max(0) > -x_16B.min(0), x_16B.max(0), x_16B.min(0))
    # Importance relative to the block's largest weight: squares of small weights would underflow.
    u = x_16B * reciprocal(extreme)
    w = u * u
    wu = w * u
    scale = np.full_like(extreme, -1 / 32)  # in units of `extreme`
    best = np.full_like(extreme, -1)
    for trial in _TRIALS:
        q = _levels(u, np.full_like(extreme, -(32 + trial)))
        sum_uq = np.einsum("ib,ib->b", wu, q)
        sum_qq = np.einsum("ib,ib,ib->b", w, q, q)
        a = sum_uq * reciprocal(sum_qq)
        gain = a * sum_uq  # the loss is sum w u^2 - gain
        better = gain > best
        scale, best = np.where(better, a, scale), np.where(better, gain, best)
    return scale * extreme


def _encode_blocks(x: FloatArray) -> ByteArray:
    n = x.shape[0]
    x_16B = np.ascontiguousarray(x.reshape(n * 16, 16).T)
    scale = _search(x_16B).reshape(n, 16)
    widest = np.take_along_axis(scale, np.abs(scale).argmax(1)[:, None], axis=1)[:, 0]
    d = (widest / np.float32(-128)).astype(np.float16).astype(np.float32)
    sc = np.clip(np.rint(scale * reciprocal(d)[:, None]), -128, 127)
    q = _levels(x_16B, reciprocal(d[:, None] * sc).ravel())
    q = np.ascontiguousarray((q + np.float32(32)).astype(np.uint8).T).reshape(n, 2, 128)
    low = (q[:, :, :64] & 15) | (q[:, :, 64:] & 15) << 4
    pairs = q.reshape(n, 2, 4, 32) >> 4
    high = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
    scales = sc.astype(np.int8).view(np.uint8)
    return np.concatenate([low.reshape(n, 128), high.reshape(n, 64), scales, fp16_bytes(d)], axis=1)


def _decode_blocks(data: ByteArray) -> FloatArray:
    n = data.shape[0]
    nibbles, pairs = data[:, :128].reshape(n, 2, 1, 64), data[:, 128:192].reshape(n, 2, 1, 32)
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(n, 2, 4, 32)
    high = np.concatenate([pairs >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    q = (low | high << 4).astype(np.int8) - np.int8(32)
    sc = np.ascontiguousarray(data[:, 192:208]).view(np.int8).astype(np.float32)
    scale = (fp16_values(data[:, 208:])[:, None] * sc)[:, :, None]
    return (scale * q.reshape(n, 16, 16).astype(np.float32)).reshape(n, BLOCK_SIZE)
