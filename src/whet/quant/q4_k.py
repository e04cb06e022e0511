"""Q4_K: super-blocks of 256 weights in 8 blocks of 32, x ~ d * sc * q - dmin * m. 4.5 bits a weight.

q is 4 bits a weight in [0, 15]; sc and m are 6 bits a block; d and dmin are fp16, one pair a super-block.
Super-block, 144 bytes: d, dmin, 12 bytes of packed sc and m, 128 bytes of q. Block 2i is in the low nibbles of the
i-th 32 bytes, block 2i+1 in the high ones. Source: ggml's block_q4_K.

The encoder chooses scale a and offset b = -dmin * m <= 0 of each block to make sum w * (a * q + b - x)^2 small, with
importance w = rms + |x|: a grid of trial scales gives q, weighted least squares gives a and b for that q, and the best
pair is polished by alternating the two. Then a and b are rounded to 6 bits, neighbours of the rounded pair are tried,
and q is taken again from the rounded pair.
Shapes: x float32 [rows, cols], data uint8 [rows, cols / 256 * 144]. Inside: B blocks, arrays [32, B] and [B].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from whet.quant.blocks import ByteArray, FloatArray, decode_rows, encode_rows, fp16_bytes, fp16_values, reciprocal

BLOCK_SIZE, BLOCK_BYTES = 256, 144
MAX_ABS = 60 * 65504.0  # dmin = max|x| / 63 must fit fp16, with room for the search

# Trial scales span / (15 + t): the block's range over a little less or more than 15 steps.
_TRIALS = np.arange(-2, 1.25, 0.25, dtype=np.float32)
_POLISH = 2


def encode(x: FloatArray) -> ByteArray:
    """Encode [rows, cols] to Q4_K. Raises WhetError as `encode_rows` does."""
    return encode_rows(x, "q4_k", BLOCK_SIZE, BLOCK_BYTES, MAX_ABS, _encode_blocks)


def decode(data: ByteArray) -> FloatArray:
    """Decode [rows, bytes] to float32 [rows, cols]."""
    return decode_rows(data, BLOCK_SIZE, BLOCK_BYTES, _decode_blocks)


class _Problem(NamedTuple):
    """The weighted least squares of one piece: x and its importance w [32, B], and their sums [B]."""

    x: FloatArray
    w: FloatArray
    wx: FloatArray
    sum_w: FloatArray
    sum_wx: FloatArray


def _problem(x_32B: FloatArray) -> _Problem:
    rms = np.sqrt(_dot(x_32B, x_32B) / np.float32(32))
    w = np.abs(x_32B) + rms
    wx = w * x_32B
    return _Problem(x_32B, w, wx, w.sum(0), wx.sum(0))


def _dot(a: FloatArray, b: FloatArray) -> FloatArray:
    return np.einsum("ib,ib->b", a, b)


def _levels(x: FloatArray, scale: FloatArray, offset: FloatArray) -> FloatArray:
    """The q of each weight, as float32, for x ~ scale * q + offset."""
    q = x - offset
    q *= reciprocal(scale)
    np.rint(q, out=q)
    return np.clip(q, 0, 15, out=q)


def _moments(p: _Problem, q: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weighted sums of q, q^2 and x * q over each block."""
    wq = p.w * q
    return wq.sum(0), _dot(wq, q), _dot(p.wx, q)


def _loss(p: _Problem, q: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
    """sum w * (a q + b - x)^2, less the constant sum w x^2."""
    sum_q, sum_qq, sum_xq = _moments(p, q)
    return _loss_from(p, sum_q, sum_qq, sum_xq, a, b)


def _loss_from(
    p: _Problem, sum_q: FloatArray, sum_qq: FloatArray, sum_xq: FloatArray, a: FloatArray, b: FloatArray
) -> FloatArray:
    return a * (a * sum_qq - 2 * sum_xq + 2 * b * sum_q) + b * (b * p.sum_w - 2 * p.sum_wx)


def _fit(p: _Problem, q: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The scale a >= 0 and offset b <= 0 that serve q best, and their loss."""
    sum_q, sum_qq, sum_xq = _moments(p, q)
    inverse = reciprocal(p.sum_w * sum_qq - sum_q * sum_q)
    a = (p.sum_w * sum_xq - p.sum_wx * sum_q) * inverse
    b = (sum_qq * p.sum_wx - sum_q * sum_xq) * inverse
    through_zero = (b > 0) | (a <= 0)
    a = np.where(through_zero, np.maximum(sum_xq * reciprocal(sum_qq), 0), a)
    b = np.where(through_zero, np.float32(0), b)
    return a, b, _loss_from(p, sum_q, sum_qq, sum_xq, a, b)


def _search(p: _Problem) -> tuple[FloatArray, FloatArray]:
    """The best scale and offset of each block, before they are rounded to 6 bits."""
    offset = np.minimum(p.x.min(0), 0)
    span = p.x.max(0) - offset
    scale = span / np.float32(15)
    loss = _loss(p, _levels(p.x, scale, offset), scale, offset)
    low = offset
    for trial in _TRIALS:
        a, b, trial_loss = _fit(p, _levels(p.x, span / (15 + trial), low))
        better = trial_loss < loss
        scale, offset, loss = (np.where(better, new, old) for new, old in ((a, scale), (b, offset), (trial_loss, loss)))
    for _ in range(_POLISH):
        a, b, trial_loss = _fit(p, _levels(p.x, scale, offset))
        better = trial_loss < loss
        scale, offset, loss = (np.where(better, new, old) for new, old in ((a, scale), (b, offset), (trial_loss, loss)))
    return scale, offset


def _round_to_six_bits(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Non-negative [n, 8] -> the fp16 unit of each super-block, as float32 [n], and multiples in [0, 63] [n, 8]."""
    unit = (values.max(1) / np.float32(63)).astype(np.float16).astype(np.float32)
    return unit, np.clip(np.rint(values * reciprocal(unit)[:, None]), 0, 63)


def _encode_blocks(x: FloatArray) -> ByteArray:
    n = x.shape[0]
    p = _problem(np.ascontiguousarray(x.reshape(n * 8, 32).T))
    scale, offset = _search(p)
    d, sc = _round_to_six_bits(scale.reshape(n, 8))
    dmin, m = _round_to_six_bits(-offset.reshape(n, 8))
    sc, m = _refine(p, np.repeat(d, 8), np.repeat(dmin, 8), sc.ravel(), m.ravel())
    q = _levels(p.x, np.repeat(d, 8) * sc, -np.repeat(dmin, 8) * m).astype(np.uint8)
    q = np.ascontiguousarray(q.T).reshape(n, 4, 2, 32)
    packed = (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(n, 128)
    scales = _pack_scales(sc.astype(np.uint8).reshape(n, 8), m.astype(np.uint8).reshape(n, 8))
    return np.concatenate([fp16_bytes(d), fp16_bytes(dmin), scales, packed], axis=1)


def _refine(
    p: _Problem, d: FloatArray, dmin: FloatArray, sc: FloatArray, m: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Try the 6-bit neighbours of each block's (sc, m), with q taken anew for each. All arrays [B]."""
    best_sc, best_m, best = sc, m, None
    for step_sc, step_m in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
        try_sc, try_m = np.clip(sc + step_sc, 0, 63), np.clip(m + step_m, 0, 63)
        a, b = d * try_sc, -dmin * try_m
        loss = _loss(p, _levels(p.x, a, b), a, b)
        if best is None:
            best = loss
            continue
        better = loss < best
        best_sc, best_m, best = (
            np.where(better, new, old) for new, old in ((try_sc, best_sc), (try_m, best_m), (loss, best))
        )
    return best_sc, best_m


def _pack_scales(sc: ByteArray, m: ByteArray) -> ByteArray:
    """[n, 8] and [n, 8] of 6 bits -> [n, 12]: the first four whole in the low bits; the last four split 4 + 2."""
    return np.concatenate(
        [
            sc[:, :4] | (sc[:, 4:] >> 4 << 6),
            m[:, :4] | (m[:, 4:] >> 4 << 6),
            (sc[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        axis=1,
    )


def _unpack_scales(data: ByteArray) -> tuple[ByteArray, ByteArray]:
    """[n, 12] -> sc [n, 8], m [n, 8]."""
    first, second, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    sc = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    m = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)
    return sc, m


def _decode_blocks(data: ByteArray) -> FloatArray:
    n = data.shape[0]
    d, dmin = fp16_values(data[:, :2]), fp16_values(data[:, 2:4])
    sc, m = _unpack_scales(data[:, 4:16])
    packed = data[:, 16:].reshape(n, 4, 1, 32)
    q = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(n, 8, 32).astype(np.float32)
    scale = (d[:, None] * sc.astype(np.float32))[:, :, None]
    offset = (dmin[:, None] * m.astype(np.float32))[:, :, None]
    return (scale * q - offset).reshape(n, BLOCK_SIZE)
