"""The decoder layers that the fused block stands in for: what sets one family's apart from the others'.

A family is recognised by the class of its layers, so that what the block computes is what that class computes. Sizes,
norms and projections are read from the layer itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class FamilySpec:
    """How a family's layer differs from Llama's.

    norm_offset: added to a norm's weight. post_norms: attention and MLP outputs are normed before they are added.
    qk_norm: each head of q and k is normed before it is rotated. fused: q, k, v are one linear layer, gate and up one.
    window: where a layer's sliding window is written: in its attention, in the config for all layers, or nowhere.
    softcap: attention scores are capped.
    """

    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    fused: bool = False
    window: Literal["none", "config", "attention"] = "none"
    softcap: bool = False


FAMILIES = {
    "LlamaDecoderLayer": FamilySpec(),
    "MistralDecoderLayer": FamilySpec(window="config"),
    "Qwen2DecoderLayer": FamilySpec(window="attention"),
    "Qwen3DecoderLayer": FamilySpec(window="attention", qk_norm=True),
    "Gemma2DecoderLayer": FamilySpec(norm_offset=1.0, post_norms=True, window="attention", softcap=True),
    "Gemma3DecoderLayer": FamilySpec(norm_offset=1.0, post_norms=True, window="attention", qk_norm=True),
    "Phi3DecoderLayer": FamilySpec(window="config", fused=True),
}


@dataclass(frozen=True)
class Norm:
    """One RMSNorm: weight [D], and what is added to the variance."""

    weight: nn.Parameter
    eps: float


@dataclass(frozen=True)
class LayerShape:
    """What of a layer stays as it is: sizes in elements, scale of the scores, window in tokens, cap of the scores.

    norms: of the block's input, after attention, before the MLP, after the MLP, of q and of k; None where absent.
    layer_type: chooses the rotary table in models that have more than one; else None.
    """

    spec: FamilySpec
    width: int
    head_dim: int
    q_heads: int
    kv_heads: int
    hidden: int
    activation: str
    scale: float
    window: int | None
    softcap: float | None
    layer_type: str | None
    input_norm: Norm
    mlp_norm: Norm
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @cached_property
    def norms(self) -> dict[str, Norm]:
        """Those it has, by name."""
        names = ("input_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "q_norm", "k_norm")
        return {name: norm for name in names if (norm := getattr(self, name)) is not None}


def family(layer: nn.Module) -> FamilySpec | None:
    """The spec of a transformers decoder layer, or None where there is none for its class."""
    kind = type(layer)
    return FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None


def read_shape(layer: nn.Module, spec: FamilySpec, config: Any) -> LayerShape | str:
    """The layer's sizes, or in words why the block can't stand in for it."""
    attention, mlp = layer.self_attn, layer.mlp
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name not in ACTIVATIONS:
        return f"activation {name!r}"
    if getattr(attention, "attention_dropout", 0.0) or getattr(config, "resid_pdrop", 0.0):
        return "dropout in the base model"
    if not getattr(attention, "is_causal", True):
        return "attention that looks both ways"
    if getattr(config, "pretraining_tp", 1) != 1:
        return "pretraining_tp"
    window = {"none": None, "config": getattr(config, "sliding_window", None)}.get(
        spec.window, getattr(attention, "sliding_window", None)
    )
    softcap = getattr(attention, "attn_logit_softcapping", None) if spec.softcap else None
    down = mlp.down_proj
    norms: dict[str, Norm | None] = {"input_norm": read_norm(layer.input_layernorm)}
    if spec.post_norms:
        norms["attention_post_norm"] = read_norm(layer.post_attention_layernorm)
        norms["mlp_norm"] = read_norm(layer.pre_feedforward_layernorm)
        norms["mlp_post_norm"] = read_norm(layer.post_feedforward_layernorm)
    else:
        norms["mlp_norm"] = read_norm(layer.post_attention_layernorm)
    if spec.qk_norm:
        norms |= {"q_norm": read_norm(attention.q_norm), "k_norm": read_norm(attention.k_norm)}
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    return LayerShape(
        spec=spec,
        width=down.out_features,
        head_dim=attention.head_dim,
        q_heads=config.num_attention_heads,
        kv_heads=kv_heads,
        hidden=down.in_features,
        activation=ACTIVATIONS[name],
        scale=attention.scaling,
        window=window,
        softcap=softcap,
        layer_type=getattr(attention, "layer_type", None),
        **norms,
    )


def projections(layer: nn.Module, spec: FamilySpec) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where the layer's linear modules are, (parent, name), by what reads one input, in the order of their outputs."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = (
        (["qkv_proj"], ["gate_up_proj"]) if spec.fused else (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"])
    )
    return {
        "qkv": [(attention, name) for name in qkv],
        "o": [(attention, "o_proj")],
        "gate_up": [(mlp, name) for name in gate_up],
        "down": [(mlp, "down_proj")],
    }


def read_norm(module: nn.Module) -> Norm:
    """An RMSNorm module's weight and epsilon."""
    return Norm(module.weight, getattr(module, "variance_epsilon", None) or module.eps)
