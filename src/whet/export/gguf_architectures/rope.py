"""Rotary position embeddings in GGUF's terms: the base, and how its frequencies are stretched for longer texts.

    theta_i = base^(-2i / dims) / f_i,   i < dims / 2;   cos and sin of position * theta_i times `attention factor`

default: f = 1. linear: f = factor (Chen et al. 2023, arXiv:2306.15595). llama3: f by wavelength, factor 1 for short
ones. yarn: f by wavelength, and an attention factor (Peng et al. 2023, arXiv:2309.00071). longrope: f from the config,
one list for texts up to the original length and one beyond it (Ding et al. 2024, arXiv:2402.13753).
llama.cpp takes linear and yarn as metadata, and the f of the others as tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from whet.errors import WhetError

FloatArray = NDArray[np.float32]
MERGED_INSTEAD = "export the model merged, for an engine that reads config.json"

# The ends of yarn's ramp, in turns over the original context, and its borders rounded to whole dimensions: built into
# llama.cpp, and what transformers takes where a config is silent.
_YARN_BUILT_IN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True)
class Rope:
    """kind: one of the kinds above. base: rope_theta. dims: how many elements of a head are rotated, the first ones.

    parameters: the rest of config.json's rope parameters.
    """

    kind: str
    base: float
    dims: int
    parameters: dict[str, Any]

    @property
    def original_context(self) -> int:
        """The training length, in tokens, that yarn, longrope and llama3 stretch."""
        return int(self.parameters["original_max_position_embeddings"])


def read_rope(parameters: dict[str, Any], head_dim: int, where: str) -> Rope:
    """Rope from `rope_parameters` as transformers standardizes them."""
    partial = parameters.get("partial_rotary_factor")
    return Rope(
        kind=str(parameters["rope_type"]),
        base=float(parameters["rope_theta"]),
        dims=int(head_dim * (1.0 if partial is None else partial)),
        parameters=parameters,
    )


def check_rope(rope: Rope, kinds: Collection[str], head_dim: int, where: str, partial: bool = False) -> None:
    """Raise WhetError for a kind, or a part of it, that llama.cpp does not compute for the family."""
    if rope.kind not in kinds:
        raise WhetError(
            f"llama.cpp has no rope type {rope.kind!r} for this architecture",
            where=where,
            fix=f"it has {', '.join(kinds)}; or {MERGED_INSTEAD}",
        )
    if rope.dims != head_dim and not partial:
        raise WhetError(
            f"llama.cpp rotates whole heads in this architecture (partial_rotary_factor = {rope.dims / head_dim:g})",
            where=where,
            fix=MERGED_INSTEAD,
        )
    for name, built_in in _YARN_BUILT_IN.items() if rope.kind == "yarn" else ():
        if (value := rope.parameters.get(name)) not in (None, built_in):
            raise WhetError(
                f"llama.cpp computes yarn with {name} = {built_in}, and the model has {value}",
                where=where,
                fix=MERGED_INSTEAD,
            )
    if rope.kind == "longrope":
        _check_longrope(rope, where)


def _check_longrope(rope: Rope, where: str) -> None:
    for name in ("short_factor", "long_factor"):
        if len(rope.parameters[name]) != rope.dims // 2:
            raise WhetError(
                f"{name} has {len(rope.parameters[name])} numbers for {rope.dims // 2} frequencies",
                where=where,
                fix="save the model again",
            )


def add_rope_metadata(writer: GGUFWriter, rope: Rope, context: int) -> None:
    """Write `rope.*`. context: the model's longest text, in tokens."""
    writer.add_rope_dimension_count(rope.dims)
    writer.add_rope_freq_base(rope.base)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope.parameters["factor"]))
    elif rope.kind == "yarn":
        _add_yarn(writer, rope, context)
    elif rope.kind == "longrope":
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
        writer.add_rope_scaling_attn_factors(longrope_attention_factor(rope, context))


def _add_yarn(writer: GGUFWriter, rope: Rope, context: int) -> None:
    factor = rope.parameters.get("factor") or context / rope.original_context
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(factor))
    writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    # llama.cpp computes the paper's factor itself, and multiplies it by this key
    writer.add_rope_scaling_attn_factors(yarn_attention_factor(rope, factor) / _mscale(factor))


def yarn_attention_factor(rope: Rope, factor: float) -> float:
    """What transformers multiplies cos and sin by under yarn."""
    if (given := rope.parameters.get("attention_factor")) is not None:
        return float(given)
    mscale, all_dim = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    return _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_attention_factor(rope: Rope, context: int) -> float:
    """What transformers multiplies cos and sin by under longrope."""
    if (given := rope.parameters.get("attention_factor")) is not None:
        return float(given)
    factor = rope.parameters.get("factor") or context / rope.original_context
    return math.sqrt(1 + math.log(factor) / math.log(rope.original_context)) if factor > 1 else 1.0


def rope_factors(rope: Rope) -> dict[str, FloatArray]:
    """GGUF tensor name -> f, [dims / 2]; empty where metadata says it all."""
    if rope.kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope)}
    if rope.kind == "longrope":
        return {
            f"rope_factors_{which}.weight": np.asarray(rope.parameters[f"{which}_factor"], dtype=np.float32)
            for which in ("long", "short")
        }
    return {}


def _llama3_factors(rope: Rope) -> FloatArray:
    """Wavelengths beyond `original / low_freq_factor` are stretched by `factor`, those under `original /
    high_freq_factor` kept, and those between blended. Source: Llama 3.1's reference code.
    """
    low, high, factor = (float(rope.parameters[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    frequency = rope.base ** -(np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims)
    turns = rope.original_context * frequency / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - keep) / factor + keep)).astype(np.float32)
