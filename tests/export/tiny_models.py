"""A tiny random model of every family that whet writes as GGUF.

Weights are wide, so that every part of a layer moves the logits; norms and biases are random too, because ones and
zeros would hide that they are missing. Gemma's are narrower, so that its logits are not much larger than those of the
others after its caps.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import PreTrainedModel

from tests.export.tiny_llama import byte_level_tokenizer

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "initializer_range": 0.03,
}
FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},
    # caps so low that they bite, and layers of both kinds
    "gemma2": {**GEMMA, "num_hidden_layers": 4, "attn_logit_softcapping": 0.05, "final_logit_softcapping": 0.5},
    "gemma3": {**GEMMA, "num_hidden_layers": 7},
}


def tiny_config(family: str, changes: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """The config of a tiny model; changes: fields that differ from the family's usual tiny one."""
    settings = {**SIZES, **FAMILY_SIZES.get(family, {}), "vocab_size": 604, "pad_token_id": 2, **(changes or {})}
    return CONFIGS[family](**settings)


def save_tiny(folder: Path, family: str, changes: Mapping[str, Any] | None = None, seed: int = 0) -> Path:
    """Write a tiny model in float32, with a byte-level tokenizer, to `folder`."""
    tokenizer = _tokenizer()
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = tiny_config(family, {"vocab_size": len(tokenizer) + 2, **tokens, **(changes or {})})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_vectors(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


def randomize_vectors(model: PreTrainedModel) -> None:
    """Move norms and biases up to a quarter away from where they start."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.rand_like(weight) * 0.5 - 0.25)


def token_ids(count: int, seed: int = 0) -> list[int]:
    """Tokens of the byte-level tokenizer, none of them special."""
    ids: list[int] = torch.randint(4, 600, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids
