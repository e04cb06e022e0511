"""Tiny random checkpoints of seven model families, with everything switched on that sets a family apart.

Weights are drawn wide, norms and biases away from one and zero, soft caps and windows small: a model at its usual
initialisation attends almost evenly, adds nothing and caps nothing, so that a wrong mask or a lost bias would not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 128  # rows of the embedding
WORDS = 120  # of the tokenizer; some families' tokenizer classes add tokens of their own
WINDOW = 6  # tokens; shorter than every row the tests use
SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration, its linear layers, and the attention plain transformers can run it with."""

    config: type
    options: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = SPLIT
    plain_attention: str = "sdpa"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}
FAMILIES = {
    "llama": Family(LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "mistral": Family(MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": Family(Qwen2Config),
    "qwen3": Family(Qwen3Config),
    "gemma2": Family(
        Gemma2Config,
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
        plain_attention="eager",  # transformers' sdpa has no soft cap
    ),
    "gemma3": Family(
        Gemma3TextConfig,
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "query_pre_attn_scalar": 24,
            "rope_parameters": TWO_ROPES,
        },
    ),
    "phi3": Family(Phi3Config, {"sliding_window": WINDOW}, targets=FUSED),
}


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a random two-layer model of family `name` (seed fixed, 64 wide) and a word tokenizer; returns `folder`."""
    family = FAMILIES[name]
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name != "phi3":
        shape["head_dim"] = 16
    model = _seeded(family.config(**shape | family.options | options)).to(dtype)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, w3 to w119, after <pad>, <s> and </s>."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, WORDS))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _seeded(config: Any) -> Any:
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif "embed" in name or "lm_head" in name:
                torch.nn.init.normal_(parameter, std=0.5)
            else:
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers from `seed` on, the global state put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
