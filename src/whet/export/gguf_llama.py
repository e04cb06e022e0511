"""Llama-architecture checkpoints in GGUF's terms: metadata, tensor names and shapes, row order, rope factors.

Hugging Face rotates the two halves of a head against each other; llama.cpp rotates neighbouring pairs. So rows of the
q and k projections (and their biases) are reordered within each head: row i of the first half goes to 2i, row i of the
second half to 2i + 1. Source: the `llama` architecture of llama.cpp and gguf's `constants.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from whet.errors import WhetError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class LlamaConfig:
    """What GGUF needs of `config.json`. `rope`: the rope parameters, `rope_type` and `rope_theta` among them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocab: int
    rms_eps: float
    rope: dict[str, Any]
    tied: bool


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint: its name there, its name in GGUF, its shape, and the heads to reorder, if any."""

    source: str
    name: str
    shape: tuple[int, ...]
    heads: int | None = None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises WhetError where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WhetError(
            "the file is missing", where=str(path), fix="give the folder that save_pretrained wrote"
        ) from None
    except json.JSONDecodeError as error:
        raise WhetError(f"this is not valid JSON: {error}", where=str(path), fix="save the model again") from None


def read_config(model_dir: Path) -> LlamaConfig:
    """Read and check `model_dir/config.json`. Raises WhetError for any model that is not plainly a Llama."""
    path = model_dir / "config.json"
    config = read_json(path)
    _check_architecture(config, str(path))
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return LlamaConfig(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            context=config["max_position_embeddings"],
            vocab=config["vocab_size"],
            rms_eps=config["rms_norm_eps"],
            rope=_rope_parameters(config, str(path)),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise WhetError(f"the field {error} is missing", where=str(path), fix="save the model again") from None


def _check_architecture(config: dict[str, Any], where: str) -> None:
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise WhetError(
            f"whet cannot write GGUF for the architecture {', '.join(architectures) or 'that config.json leaves out'}",
            where=where,
            fix=f"export one of {', '.join(ARCHITECTURES)}",
        )
    if config.get("quantization_config"):
        raise WhetError(
            "the checkpoint is quantized, and GGUF is made from 16- or 32-bit weights",
            where=where,
            fix='save it with save_method="merged_16bit" first',
        )
    if config.get("sliding_window"):
        raise WhetError(
            f"sliding-window attention (sliding_window = {config['sliding_window']}) has no place in GGUF's llama",
            where=where,
            fix='set "sliding_window": null if the model is never run beyond that window',
        )
    if config.get("hidden_act", "silu") != "silu":
        raise WhetError(f"GGUF's llama has silu, not hidden_act = {config['hidden_act']!r}", where=where)


def _rope_parameters(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The rope parameters in one dict, whether config.json has `rope_parameters` or the older pair of fields."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **scaling}
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise WhetError(
            f"rope type {rope['rope_type']!r} is not supported", where=where, fix="use default, linear or llama3 rope"
        )
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise WhetError(
            f"rope over a part of each head is not supported (partial_rotary_factor = {partial})", where=where
        )
    return rope


def add_architecture_metadata(writer: GGUFWriter, config: LlamaConfig) -> None:
    """Write the `llama.*` keys."""
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope["rope_theta"]))
    writer.add_vocab_size(config.vocab)
    if config.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope["factor"]))


def rope_factors(config: LlamaConfig) -> NDArray[np.float32] | None:
    """The divisor of each rope frequency under llama3 scaling, [head_dim / 2]; None without it.

    Wavelengths beyond `original / low_freq_factor` are stretched by `factor`, those under `original /
    high_freq_factor` kept, and those between blended. Source: Llama 3.1's reference code.
    """
    rope = config.rope
    if rope["rope_type"] != "llama3":
        return None
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequency = rope["rope_theta"] ** -(np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    turns = original * frequency / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - keep) / factor + keep)).astype(np.float32)


def reorder_heads(x: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows [heads * head_dim, ...] from half-and-half to pairs within each head."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def expected_tensors(config: LlamaConfig) -> list[SourceTensor]:
    """Every weight the model must have, in GGUF's usual order."""
    tensors = [SourceTensor("model.embed_tokens.weight", "token_embd.weight", (config.vocab, config.hidden))]
    for layer in range(config.layers):
        tensors += _layer_tensors(config, layer)
    tensors.append(SourceTensor("model.norm.weight", "output_norm.weight", (config.hidden,)))
    if not config.tied:
        tensors.append(SourceTensor("lm_head.weight", "output.weight", (config.vocab, config.hidden)))
    return tensors


def optional_tensors(config: LlamaConfig) -> list[SourceTensor]:
    """The biases a Llama checkpoint may have: one for each projection."""
    return [
        SourceTensor(
            tensor.source.removesuffix("weight") + "bias",
            tensor.name.removesuffix("weight") + "bias",
            tensor.shape[:1],
            tensor.heads,
        )
        for tensor in expected_tensors(config)
        if "_proj." in tensor.source
    ]


def _layer_tensors(config: LlamaConfig, layer: int) -> list[SourceTensor]:
    hidden, intermediate = config.hidden, config.intermediate
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    parts: list[tuple[str, str, tuple[int, ...], int | None]] = [
        ("input_layernorm", "attn_norm", (hidden,), None),
        ("self_attn.q_proj", "attn_q", (q, hidden), config.heads),
        ("self_attn.k_proj", "attn_k", (kv, hidden), config.kv_heads),
        ("self_attn.v_proj", "attn_v", (kv, hidden), None),
        ("self_attn.o_proj", "attn_output", (hidden, q), None),
        ("post_attention_layernorm", "ffn_norm", (hidden,), None),
        ("mlp.gate_proj", "ffn_gate", (intermediate, hidden), None),
        ("mlp.up_proj", "ffn_up", (intermediate, hidden), None),
        ("mlp.down_proj", "ffn_down", (hidden, intermediate), None),
    ]
    return [
        SourceTensor(f"model.layers.{layer}.{source}.weight", f"blk.{layer}.{name}.weight", shape, heads)
        for source, name, shape, heads in parts
    ]
