"""Which tensor of a model gets which type: the mixtures llama.cpp knows by names such as Q4_K_M.

A mixture has a base type, which most matrices get, and gives more bits to those that hurt most when rounded: the output
matrix (the token embedding where the two are tied), the values of attention, the down projections, and more of them in
the first and the last layers. Vectors and norms stay F32. The rules are facts about llama.cpp's `llama_model_quantize`
(release v0.5.0), which the tests call and compare with, name by name.

A row that does not divide into a type's blocks of 256 gets a type with blocks of 32 and at least as many bits; a row
that does not divide into those either gets F16. llama.cpp has the same table, but refuses where its type has blocks
of 32 to begin with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gguf import LlamaFileType

from whet.errors import WhetError


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask about a model.

    architecture: GGUF's name of it. heads, kv_heads: of attention. tied: the token embedding is also the output matrix.
    imatrix: an importance matrix guides the rounding, which makes some of the extra bits unnecessary.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    imatrix: bool = False


Rule = Callable[[int, ModelFacts], bool]
# The first rule that holds in a layer gives the type.
Rules = tuple[tuple[Rule, str], ...]


def _always(layer: int, facts: ModelFacts) -> bool:
    return True


def _first(count: int) -> Rule:
    return lambda layer, facts: layer < count


def _first_part(parts: int) -> Rule:
    return lambda layer, facts: layer < facts.layers // parts


def _first_eighth_without_imatrix(layer: int, facts: ModelFacts) -> bool:
    return layer < facts.layers // 8 and not facts.imatrix


def _first_eighth_with_imatrix(layer: int, facts: ModelFacts) -> bool:
    return layer < facts.layers // 8 and facts.imatrix


def _spread(layer: int, facts: ModelFacts) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = facts.layers // 8
    return layer < eighth or layer >= 7 * facts.layers // 8 or (layer - eighth) % 3 == 2


def _shared_values(layer: int, facts: ModelFacts) -> bool:
    """Four or more query heads share one head of keys and values, so that attn_v is small."""
    return facts.heads // facts.kv_heads >= 4


@dataclass(frozen=True)
class Mix:
    """A quantization a user may name. file_type: what GGUF's metadata records for it. base: the type of every matrix
    that no rule names. attn_v also rules over attn_qkv, the three projections in one."""

    file_type: LlamaFileType
    base: str
    attn_v: Rules = ()
    attn_output: Rules = ()
    ffn_down: Rules = ()


_F = LlamaFileType
MIXES: dict[str, Mix] = {
    "f32": Mix(_F.ALL_F32, "f32"),
    "f16": Mix(_F.MOSTLY_F16, "f16"),
    "bf16": Mix(_F.MOSTLY_BF16, "bf16"),
    "q8_0": Mix(_F.MOSTLY_Q8_0, "q8_0"),
    "q4_0": Mix(_F.MOSTLY_Q4_0, "q4_0", ffn_down=((_first_eighth_with_imatrix, "q4_1"),)),
    "q4_1": Mix(_F.MOSTLY_Q4_1, "q4_1"),
    "q5_0": Mix(_F.MOSTLY_Q5_0, "q5_0", ffn_down=((_first_eighth_with_imatrix, "q5_1"),)),
    "q5_1": Mix(_F.MOSTLY_Q5_1, "q5_1"),
    "q2_k": Mix(
        _F.MOSTLY_Q2_K,
        "q2_k",
        attn_v=((_shared_values, "q4_k"), (_always, "q3_k")),
        attn_output=((_always, "q3_k"),),
        ffn_down=((_always, "q3_k"),),
    ),
    "q3_k_s": Mix(_F.MOSTLY_Q3_K_S, "q3_k"),
    "q3_k_m": Mix(
        _F.MOSTLY_Q3_K_M,
        "q3_k",
        attn_v=((_first(2), "q5_k"), (_always, "q4_k")),
        attn_output=((_always, "q4_k"),),
        ffn_down=((_first_part(16), "q5_k"), (_always, "q4_k")),
    ),
    "q3_k_l": Mix(
        _F.MOSTLY_Q3_K_L,
        "q3_k",
        attn_v=((_always, "q5_k"),),
        attn_output=((_always, "q5_k"),),
        ffn_down=((_always, "q5_k"),),
    ),
    "q4_k_s": Mix(_F.MOSTLY_Q4_K_S, "q4_k", attn_v=((_first(4), "q5_k"),), ffn_down=((_first_part(8), "q5_k"),)),
    "q4_k_m": Mix(_F.MOSTLY_Q4_K_M, "q4_k", attn_v=((_spread, "q6_k"),), ffn_down=((_spread, "q6_k"),)),
    "q5_k_s": Mix(_F.MOSTLY_Q5_K_S, "q5_k"),
    "q5_k_m": Mix(_F.MOSTLY_Q5_K_M, "q5_k", attn_v=((_spread, "q6_k"),), ffn_down=((_spread, "q6_k"),)),
    "q6_k": Mix(_F.MOSTLY_Q6_K, "q6_k"),
    "iq4_nl": Mix(
        _F.MOSTLY_IQ4_NL,
        "iq4_nl",
        attn_v=((_shared_values, "q5_k"),),
        ffn_down=((_first_eighth_without_imatrix, "q5_k"),),
    ),
}

_UNQUANTIZED = ("f32", "f16", "bf16")
_BLOCKS_OF_32 = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
# What serves where rows do not divide into blocks of 256.
_NARROWER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def check_quantization(name: str) -> None:
    """Raise WhetError unless `name` is a quantization whet writes."""
    if name not in MIXES:
        raise WhetError(
            f"whet writes no GGUF quantization {name!r}", where="quantization", fix=f"choose one of {', '.join(MIXES)}"
        )


def wanted_type(quantization: str, tensor: str, dims: int, facts: ModelFacts) -> str:
    """The type `quantization` gives a tensor, before asking whether its rows fit.

    tensor: GGUF name, as in `blk.3.attn_v.weight`. dims: 1 for vectors.
    """
    mix = MIXES[quantization]
    if dims == 1 or tensor.endswith("_norm.weight"):
        return "f32"
    if mix.base in _UNQUANTIZED:
        return mix.base
    if tensor == ("token_embd.weight" if facts.tied else "output.weight"):
        return "q8_0" if mix.base == "q8_0" else "q6_k"
    return _layer_type(mix, tensor, facts)


def _layer_type(mix: Mix, tensor: str, facts: ModelFacts) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(attn_v|attn_qkv|attn_output|ffn_down)\.weight", tensor)
    if match is None:
        return mix.base
    layer, part = int(match[1]), match[2].replace("qkv", "v")
    rules: Rules = getattr(mix, part)
    chosen = next((kind for rule, kind in rules if rule(layer, facts)), mix.base)
    if part == "attn_v" and chosen in ("q3_k", "q4_k") and _is_70b(facts):
        return "q5_k"
    return chosen


def _is_70b(facts: ModelFacts) -> bool:
    """What llama.cpp takes for a 70B model: 80 layers of a Qwen 2, or of a Llama whose heads share keys and values."""
    if facts.layers != 80:
        return False
    return facts.architecture == "qwen2" or (facts.architecture == "llama" and facts.kv_heads < facts.heads)


def fitting_type(wanted: str, cols: int) -> str:
    """`wanted`, or the type that serves instead where rows of `cols` weights do not divide into its blocks."""
    if wanted in _NARROWER and cols % 256:
        wanted = _NARROWER[wanted]
    return "f16" if wanted in _BLOCKS_OF_32 and cols % 32 else wanted
