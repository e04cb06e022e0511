"""The GGUF tensor types whet writes. Which tensor of a model gets which: `gguf_mixes.py`."""

from __future__ import annotations

from gguf import GGMLQuantizationType as _QT

from whet.quant import floats, k_quants, legacy
from whet.quant.blocks import ByteArray, FloatArray, GGUFType

__all__ = ["TYPES", "ByteArray", "FloatArray", "GGUFType"]

# Half the distance between the smallest numbers of each format.
_FP16 = 2.0**-25
_BF16 = 2.0**-134
_F16_MAX = floats.F16_MAX_ABS

_f, _l, _k = floats, legacy, k_quants
# Columns: name, ggml's type, weights and bytes a block, encoder, decoder, largest magnitude, and three error bounds:
# half a step of the grid, the rounding of scales, and what the search may clip.
_ALL = (
    GGUFType("f32", _QT.F32, 1, 4, _f.encode_f32, _f.decode_f32, _f.F32_MAX_ABS, 0.0, 0.0, 0.0),
    GGUFType("f16", _QT.F16, 1, 2, _f.encode_f16, _f.decode_f16, _F16_MAX, 2.0**-11, 2.0**-11, _FP16),
    GGUFType("bf16", _QT.BF16, 1, 2, _f.encode_bf16, _f.decode_bf16, _f.BF16_MAX_ABS, 2.0**-8, 2.0**-8, _BF16),
    GGUFType("q8_0", _QT.Q8_0, 32, 34, _l.encode_q8_0, _l.decode_q8_0, 127 * _F16_MAX, 0.005, 0.005, 127 * _FP16),
    GGUFType("q4_0", _QT.Q4_0, 32, 18, _l.encode_q4_0, _l.decode_q4_0, 8 * _F16_MAX, 0.13, 0.5, 8 * _FP16),
    GGUFType("q4_1", _QT.Q4_1, 32, 20, _l.encode_q4_1, _l.decode_q4_1, _F16_MAX, 0.07, 0.9, 16 * _FP16),
    GGUFType("q5_0", _QT.Q5_0, 32, 22, _l.encode_q5_0, _l.decode_q5_0, 16 * _F16_MAX, 0.065, 0.5, 16 * _FP16),
    GGUFType("q5_1", _QT.Q5_1, 32, 24, _l.encode_q5_1, _l.decode_q5_1, _F16_MAX, 0.035, 0.9, 32 * _FP16),
    GGUFType("iq4_nl", _QT.IQ4_NL, 32, 18, _l.encode_iq4_nl, _l.decode_iq4_nl, 127 * _F16_MAX, 0.25, 0.5, 127 * _FP16),
    GGUFType("q2_k", _QT.Q2_K, 256, 84, _k.encode_q2_k, _k.decode_q2_k, 15 * _F16_MAX, 0.6, 0.9, 15 * 4 * _FP16),
    GGUFType("q3_k", _QT.Q3_K, 256, 110, _k.encode_q3_k, _k.decode_q3_k, 120 * _F16_MAX, 0.4, 0.6, 32 * 4 * _FP16),
    GGUFType("q4_k", _QT.Q4_K, 256, 144, _k.encode_q4_k, _k.decode_q4_k, 60 * _F16_MAX, 0.15, 0.9, 63 * 16 * _FP16),
    GGUFType("q5_k", _QT.Q5_K, 256, 176, _k.encode_q5_k, _k.decode_q5_k, 60 * _F16_MAX, 0.1, 0.9, 63 * 32 * _FP16),
    GGUFType("q6_k", _QT.Q6_K, 256, 210, _k.encode_q6_k, _k.decode_q6_k, 3810 * _F16_MAX, 0.05, 0.5, 4096 * _FP16),
)
TYPES: dict[str, GGUFType] = {kind.name: kind for kind in _ALL}
