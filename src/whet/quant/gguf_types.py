"""The GGUF tensor types whet writes, and which tensor of a model gets which.

A quantization such as `q4_k_m` is a mixture: matrices that hurt most when rounded get more bits. The rule is
llama.cpp's for Llama models: Q6_K for the output matrix (the token embedding where the two are tied), and for attn_v
and ffn_down in the first and last eighth of the layers and in every third between; Q4_K for every other matrix; F32
for vectors. Rows that do not divide into super-blocks of 256 fall back to Q8_0, and to F16 where 32 does not divide
them either; the caller reports it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType

from whet.errors import WhetError
from whet.quant import floats, q4_k, q6_k, q8_0
from whet.quant.blocks import ByteArray, FloatArray

# Half the distance between the smallest numbers of each format.
_FP16_HALF_STEP = 2.0**-25
_BF16_HALF_STEP = 2.0**-134


@dataclass(frozen=True)
class GGUFType:
    """One tensor type: how to encode and decode it, and how far a decoded weight may lie from its source.

    relative: error bound as a fraction of the largest magnitude in the block.
    absolute: added to it; what fp16 scales near zero lose.
    """

    name: str
    ggml: GGMLQuantizationType
    block_size: int
    block_bytes: int
    encode: Callable[[FloatArray], ByteArray]
    decode: Callable[[ByteArray], FloatArray]
    relative: float
    absolute: float

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights; `cols` is a multiple of the block size."""
        return cols // self.block_size * self.block_bytes

    def error_bound(self, x: FloatArray) -> FloatArray:
        """The largest permitted |decoded - x| of each block of x [rows, cols]: [blocks, 1]."""
        largest = np.abs(x.reshape(-1, self.block_size)).max(1, keepdims=True)
        return largest * np.float32(self.relative) + np.float32(self.absolute)


_QT = GGMLQuantizationType
TYPES: dict[str, GGUFType] = {
    t.name: t
    for t in (
        GGUFType("f32", _QT.F32, 1, 4, floats.encode_f32, floats.decode_f32, 0.0, 0.0),
        GGUFType("f16", _QT.F16, 1, 2, floats.encode_f16, floats.decode_f16, 2.0**-11, _FP16_HALF_STEP),
        GGUFType("bf16", _QT.BF16, 1, 2, floats.encode_bf16, floats.decode_bf16, 2.0**-8, _BF16_HALF_STEP),
        # Half a step of max / 127, and the rounding of d to fp16.
        GGUFType("q8_0", _QT.Q8_0, 32, 34, q8_0.encode, q8_0.decode, 0.5 / 127 + 2.0**-10, 127 * _FP16_HALF_STEP),
        # Half a step of 2 max / 15, the 6-bit rounding of scale and offset, and what the search may clip.
        GGUFType("q4_k", _QT.Q4_K, 256, 144, q4_k.encode, q4_k.decode, 0.15, 63 * 16 * _FP16_HALF_STEP),
        # Half a step of max / 32, the int8 rounding of the scale, and what the search may clip.
        GGUFType("q6_k", _QT.Q6_K, 256, 210, q6_k.encode, q6_k.decode, 0.05, 128 * 32 * _FP16_HALF_STEP),
    )
}

# The quantizations a user may name, and the file type that GGUF's metadata records for them.
QUANTIZATIONS: dict[str, LlamaFileType] = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}


def check_quantization(name: str) -> None:
    """Raise WhetError unless `name` is a quantization whet writes."""
    if name not in QUANTIZATIONS:
        raise WhetError(
            f"whet writes no GGUF quantization {name!r}",
            where="quantization",
            fix=f"choose one of {', '.join(QUANTIZATIONS)}",
        )


def wanted_type(quantization: str, tensor: str, dims: int, layers: int, tied: bool) -> GGUFType:
    """The type that `quantization` gives a tensor, before asking whether its rows fit.

    tensor: GGUF name, as in `blk.3.attn_v.weight`. dims: 1 for vectors. tied: the token embedding is also the output.
    """
    if dims == 1:
        return TYPES["f32"]
    if quantization != "q4_k_m":
        return TYPES[quantization]
    if tensor == ("token_embd.weight" if tied else "output.weight"):
        return TYPES["q6_k"]
    match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", tensor)
    return TYPES["q6_k" if match and _gets_more_bits(int(match[1]), layers) else "q4_k"]


def _gets_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def fitting_type(wanted: GGUFType, cols: int) -> GGUFType:
    """`wanted`, or the type that serves instead when rows of `cols` weights do not divide into its blocks."""
    for candidate in (wanted, TYPES["q8_0"], TYPES["f16"]):
        if cols % candidate.block_size == 0:
            return candidate
    raise AssertionError("f16 has blocks of one weight")
