"""What of every family an export to GGUF can get wrong, and the logits of llama.cpp and of transformers for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from tests.export.tiny_models import save_tiny, token_ids
from whet.export.gguf import GGUFReport, write_gguf
from whet.export.llama_cpp import Reading, read_logits


@dataclass(frozen=True)
class Case:
    """changes: fields of the tiny model's config. without: fields that take the part under test away again.

    tokens: the length of the text.
    """

    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 48


def _rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


def _two_ropes(full: dict[str, Any], local: float = 10000.0) -> dict[str, Any]:
    sliding = _rope("default", local)["rope_parameters"]
    return {"rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": sliding}}


PLAIN = _rope("default")
LINEAR = _rope("linear", factor=4.0)
LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.5 + 0.5 * i for i in range(8)],
}
# llama.cpp's contexts come in steps of 256 tokens, and its choice between the two ropes with them
LONGROPE = {**_rope("longrope", **LONG), "original_max_position_embeddings": 256}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
WINDOW_OFF = {"sliding_window": 1024}

CASES = {
    # the plain families
    "llama": Case("llama"),
    "mistral": Case("mistral"),
    "qwen2": Case("qwen2"),
    "qwen3": Case("qwen3"),
    "gemma2": Case("gemma2"),
    "gemma3": Case("gemma3"),
    "phi3": Case("phi3"),
    # heads and heads' sizes
    "llama, heads wider than the model": Case("llama", {"head_dim": 32}),
    "phi3, no groups": Case("phi3", {"num_key_value_heads": 4}),
    "llama, one kv head": Case("llama", {"num_key_value_heads": 1}),
    # tied and untied heads, biases, the norms' epsilon
    "llama, tied": Case("llama", {"tie_word_embeddings": True}),
    "qwen2, tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3, tied": Case("qwen3", {"tie_word_embeddings": True}),
    "phi3, tied": Case("phi3", {"tie_word_embeddings": True}),
    "gemma3, untied": Case("gemma3", {"tie_word_embeddings": False}),
    "llama, attention biases": Case("llama", {"attention_bias": True}, {"attention_bias": False}),
    "llama, mlp biases": Case("llama", {"mlp_bias": True}, {"mlp_bias": False}),
    "llama, epsilon": Case("llama", {"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-6}),
    "gemma3, epsilon": Case("gemma3", {"rms_norm_eps": 0.1}, {"rms_norm_eps": 1e-6}),
    # rope
    "llama, base": Case("llama", _rope("default", 500.0), PLAIN),
    "llama, linear": Case("llama", LINEAR, PLAIN),
    "llama, llama3": Case("llama", LLAMA3, PLAIN),
    "llama, yarn": Case("llama", YARN, PLAIN),
    "llama, longrope, short text": Case("llama", LONGROPE, PLAIN),
    "mistral, yarn": Case("mistral", YARN, PLAIN),
    "qwen2, linear": Case("qwen2", LINEAR, PLAIN),
    "qwen2, yarn": Case("qwen2", YARN, PLAIN),
    "qwen3, yarn": Case("qwen3", YARN, PLAIN),
    "qwen3, yarn with an attention factor": Case(
        "qwen3", {"rope_parameters": YARN["rope_parameters"] | {"attention_factor": 1.6}}, YARN
    ),
    "llama, yarn with mscales": Case(
        "llama", {"rope_parameters": YARN["rope_parameters"] | {"mscale": 2.0, "mscale_all_dim": 0.5}}, YARN
    ),
    "gemma2, linear": Case("gemma2", LINEAR, PLAIN),
    "gemma3, linear on the full layers": Case("gemma3", _two_ropes(LINEAR), _two_ropes(PLAIN)),
    "gemma3, base of the sliding layers": Case("gemma3", _two_ropes(PLAIN, 100.0), _two_ropes(PLAIN)),
    "phi3, rope over a part of each head": Case(
        "phi3", _rope("default", partial_rotary_factor=0.5), _rope("default", partial_rotary_factor=1.0)
    ),
    "phi3, longrope, short text": Case("phi3", LONGROPE, PLAIN),
    "phi3, longrope, long text": Case("phi3", LONGROPE, PLAIN, tokens=300),
    "phi3, longrope with an attention factor": Case(
        "phi3", {**LONGROPE, "rope_parameters": LONGROPE["rope_parameters"] | {"attention_factor": 1.6}}, LONGROPE
    ),
    "phi3, longrope over a part of each head": Case(
        "phi3",
        {
            **_rope("longrope", partial_rotary_factor=0.5, **{name: rope[:4] for name, rope in LONG.items()}),
            "original_max_position_embeddings": 256,
        },
        _rope("default", partial_rotary_factor=0.5),
    ),
    # Gemma's own
    "gemma2, windows": Case("gemma2", without=WINDOW_OFF),
    "gemma2, capped scores": Case("gemma2", without={"attn_logit_softcapping": 50.0}),
    "gemma2, capped logits": Case("gemma2", without={"final_logit_softcapping": 30.0}),
    "gemma2, the 27B model's scale": Case(
        "gemma2",
        {"num_hidden_layers": 46, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0},
        {"query_pre_attn_scalar": 32},
    ),
    "gemma3, windows": Case("gemma3", without=WINDOW_OFF),
    "gemma3, capped logits": Case("gemma3", {"final_logit_softcapping": 0.5}, {"final_logit_softcapping": None}),
    "gemma3, the 27B model's scale": Case(
        "gemma3",
        {"num_hidden_layers": 62, "query_pre_attn_scalar": 16, "initializer_range": 0.015},
        {"query_pre_attn_scalar": 32},
    ),
    # sliding windows that llama.cpp does not have
    "mistral, window": Case("mistral", {"sliding_window": 32}, {"sliding_window": None}),
    "qwen2, window": Case("qwen2", QWEN_WINDOW, {"layer_types": ["full_attention"] * 2}),
    "qwen3, window": Case("qwen3", QWEN_WINDOW, {"layer_types": ["full_attention"] * 2}),
    "phi3, window": Case("phi3", {"sliding_window": 32}, {"sliding_window": None}),
}
WITHOUT_WINDOW = tuple(name for name in CASES if name.endswith(", window"))

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """A case's logits [tokens, vocabulary]: llama.cpp's, transformers', and transformers' without the part."""

    folder: Path
    report: GGUFReport
    found: Logits
    expected: Logits
    without: Logits


def measure(scratch: Path) -> dict[str, Measured]:
    """Every case, by one process of llama.cpp. scratch: an empty folder."""
    folders = {
        name: save_tiny(scratch / str(number), case.family, case.changes)
        for number, (name, case) in enumerate(CASES.items())
    }
    # the file is not compared with the folder here: that it is the same model is what the logits are to say
    reports = {name: write_gguf(folder, folder / "m.gguf", "f32", check=False) for name, folder in folders.items()}
    texts = {name: token_ids(case.tokens) for name, case in CASES.items()}
    found = read_logits([Reading(reports[name].path, texts[name]) for name in CASES], threads=1)
    return {
        name: Measured(
            folder=folders[name],
            report=reports[name],
            found=logits,
            expected=logits_of(load(folders[name]), texts[name]),
            without=logits_of(load(folders[name], case.without), texts[name]),
        )
        for (name, case), logits in zip(CASES.items(), found, strict=True)
    }


def load(folder: Path, changes: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """The model by transformers, in float32; changes: fields of the config to read its weights with."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **(changes or {})
    )


def logits_of(model: PreTrainedModel, tokens: list[int]) -> Logits:
    with torch.no_grad():
        logits: Logits = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def furthest(a: Logits, b: Logits) -> float:
    return float(np.abs(a - b).max())
