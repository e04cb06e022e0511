"""What is read from config.json, and what is refused there because llama.cpp would compute it differently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.export.tiny_models import CONFIGS, tiny_config
from whet.errors import WhetError
from whet.export.gguf_architectures import ARCHITECTURES, architecture_of
from whet.export.gguf_architectures.base import reorder_heads
from whet.export.gguf_architectures.rope import (
    longrope_attention_factor,
    read_rope,
    rope_factors,
    yarn_attention_factor,
)

CLASSES = dict(zip(CONFIGS, ARCHITECTURES, strict=False))  # classes that share a family come after these


def save(folder: Path, family: str, changes: Mapping[str, Any] | None = None) -> Path:
    """A config.json alone."""
    config = tiny_config(family, changes)
    config.architectures = [CLASSES[family]]
    config.save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rope_of(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
FULL, SLIDING = "full_attention", "sliding_attention"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dynamic rope": ("llama", rope_of("dynamic", factor=2.0), "no rope type 'dynamic'"),
    "llama3 rope of a family without factors": ("qwen2", rope_of("llama3", **LLAMA3), "no rope type 'llama3'"),
    "yarn of gemma3, whose sliding layers it would stretch too": (
        "gemma3",
        {"rope_parameters": {FULL: rope_of("yarn", **YARN)["rope_parameters"], SLIDING: {"rope_type": "default"}}},
        "no rope type 'yarn'",
    ),
    "stretched rope of gemma3's sliding layers": (
        "gemma3",
        {"rope_parameters": {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "no rope type 'linear'",
    ),
    "yarn's betas": ("qwen3", rope_of("yarn", **YARN, beta_fast=16.0), "beta_fast = 32, and the model has 16"),
    "yarn's exact ramp": ("llama", rope_of("yarn", **YARN, truncate=False), "truncate = True, and the model has False"),
    "rope over a part of each head": (
        "llama",
        rope_of("default", partial_rotary_factor=0.5),
        r"rotates whole heads .*partial_rotary_factor = 0.5",
    ),
    "longrope of another size": (
        "llama",
        rope_of("longrope", short_factor=[1.0] * 3, long_factor=[1.0] * 3, factor=4.0),
        "short_factor has 3 numbers for 8 frequencies",
    ),
    "another activation": ("qwen3", {"hidden_act": "gelu"}, "hidden_act = 'silu'.*the model has 'gelu'"),
    "gemma's exact gelu": ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu_pytorch_tanh'"),
    "heads wider than qwen2": ("qwen2", {"head_dim": 32}, "head_dim = 16, and the model has 32"),
    "biases of qwen3": ("qwen3", {"attention_bias": True}, "attention_bias = False"),
    "biases of gemma3": ("gemma3", {"attention_bias": True}, "attention_bias = False"),
    "another scale of gemma2's scores": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 32"),
    "another scale of gemma3's scores": ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 32"),
    "another order of layers": ("gemma2", {"layer_types": [FULL, SLIDING] * 2}, "all but the last of every 2 layers"),
    "another order of gemma3's layers": (
        "gemma3",
        {"layer_types": [SLIDING, FULL] * 3 + [SLIDING]},
        "all but the last of every 6 layers",
    ),
    "gemma2 without a cap": ("gemma2", {"attn_logit_softcapping": None}, "cannot do without attn_logit_softcapping"),
    "gemma3 with a cap on scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = None"),
    "gemma2 untied": ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings = True"),
    "gemma3 that looks both ways": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_llama_cpp_would_compute_differently_is_refused(fault: str, tmp_path: Path) -> None:
    """Catches a file that loads, answers, and answers wrongly."""
    family, changes, match = REFUSED[fault]
    with pytest.raises(WhetError, match=match) as caught:
        architecture_of(save(tmp_path, family, changes))
    assert caught.value.where == str(tmp_path / "config.json")
    assert caught.value.fix


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_has_one_name_and_one_source(family: str, tmp_path: Path) -> None:
    """Catches two tensors of the checkpoint under one GGUF name, the second of which would win in silence."""
    tensors = architecture_of(save(tmp_path, family)).expected_tensors()
    for names in ([tensor.name for tensor in tensors], [tensor.source for tensor in tensors]):
        assert len(names) == len(set(names))


def test_defaults_that_config_json_leaves_out_are_the_models(tmp_path: Path) -> None:
    """Gemma 2 as Google published it names neither a tied head nor layer types."""
    folder = save(tmp_path, "gemma2")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for name in ("tie_word_embeddings", "layer_types", "rope_parameters"):
        del content[name]
    path.write_text(json.dumps(content | {"rope_theta": 1234.0}))
    config = architecture_of(folder).config
    assert config.tied
    assert config.layer_types == (SLIDING, FULL) * 2
    assert (config.rope.kind, config.rope.base) == ("default", 1234.0)


def test_older_names_of_phi3s_rope(tmp_path: Path) -> None:
    """Phi-3-mini-128k as Microsoft published it has rope_scaling, and the original length outside it."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = edit(save(tmp_path, "phi3"), rope_parameters=None, rope_scaling=scaling, rope_theta=500.0)
    rope = architecture_of(edit(folder, original_max_position_embeddings=256)).config.rope
    assert (rope.kind, rope.base, rope.original_context) == ("longrope", 500.0, 256)
    assert set(rope_factors(rope)) == {"rope_factors_long.weight", "rope_factors_short.weight"}


def test_older_rope_scaling_of_llama(tmp_path: Path) -> None:
    """Checkpoints from before transformers 5 have rope_theta and rope_scaling of their own."""
    scaling = {"type": "linear", "factor": 2.0}
    folder = edit(save(tmp_path, "llama"), rope_parameters=None, rope_scaling=scaling, rope_theta=1234.0)
    rope = architecture_of(folder).config.rope
    assert (rope.kind, rope.base, rope.parameters["factor"]) == ("linear", 1234.0, 2.0)


def test_what_longrope_means_is_noted(tmp_path: Path) -> None:
    """llama.cpp chooses by the context it is opened with."""
    rope = rope_of("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)
    folder = save(tmp_path, "phi3", {**rope, "original_max_position_embeddings": 256})
    assert any("256 tokens or fewer" in note for note in architecture_of(folder).notes)


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "llama"}', '{"architectures": ["LlamaForCausalLM"]}'])
def test_broken_config(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WhetError) as caught:
        architecture_of(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")


def test_the_config_of_another_model_is_no_llamas(tmp_path: Path) -> None:
    """`architectures` chooses the family and `model_type` the config: both must name the same model."""
    with pytest.raises(WhetError, match="model_type = 'llama', and the model has 'qwen2'"):
        architecture_of(edit(save(tmp_path, "qwen2"), architectures=["LlamaForCausalLM"]))


# Rope against transformers' own functions


def _transformers(rope_parameters: dict[str, Any], context: int) -> tuple[np.ndarray, float]:
    """Frequencies [dims / 2] and attention factor, of a model of 64 with heads of 16."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=context, rope_parameters=rope_parameters
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_parameters["rope_type"]](config)
    return frequencies.numpy(), float(factor)


@settings(max_examples=30)
@given(
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 4.0),
    spread=st.floats(0.1, 8.0),
    original=st.integers(16, 100_000),
    base=st.floats(100.0, 1e7),
)
def test_llama3_factors(factor: float, low: float, spread: float, original: int, base: float) -> None:
    """Catches a frequency in the wrong one of llama3's three bands."""
    parameters = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + spread,
        "original_max_position_embeddings": original,
    }
    expected, _ = _transformers(dict(parameters), 200_000)
    plain = base ** -(np.arange(0, 16, 2) / 16)
    found = rope_factors(read_rope(parameters, 16, ""))["rope_freqs.weight"]
    np.testing.assert_allclose(plain / found, expected, rtol=2e-4)


@settings(max_examples=30)
@given(
    factor=st.floats(1.0, 64.0),
    attention=st.none() | st.floats(0.1, 4.0),
    mscale=st.none() | st.floats(0.1, 4.0),
    all_dim=st.none() | st.floats(0.1, 4.0),
)
def test_yarn_attention_factor(
    factor: float, attention: float | None, mscale: float | None, all_dim: float | None
) -> None:
    """Catches scores at another temperature than the model's."""
    given_ = {"attention_factor": attention, "mscale": mscale, "mscale_all_dim": all_dim}
    parameters = rope_of("yarn", factor=factor, original_max_position_embeddings=64, **given_)["rope_parameters"]
    _, expected = _transformers(dict(parameters), 1024)
    assert yarn_attention_factor(read_rope(parameters, 16, ""), factor) == pytest.approx(expected)


@settings(max_examples=30)
@given(original=st.integers(16, 4096), times=st.integers(1, 64), attention=st.none() | st.floats(0.1, 4.0))
def test_longrope_attention_factor(original: int, times: int, attention: float | None) -> None:
    """Catches scores at another temperature than the model's."""
    parameters = rope_of(
        "longrope",
        short_factor=[1.0] * 8,
        long_factor=[2.0] * 8,
        original_max_position_embeddings=original,
        attention_factor=attention,
    )["rope_parameters"]
    _, expected = _transformers(dict(parameters), original * times)
    assert longrope_attention_factor(read_rope(parameters, 16, ""), original * times) == pytest.approx(expected)


@given(heads=st.integers(1, 5), half=st.integers(1, 6), cols=st.integers(1, 3))
def test_reordering_pairs_the_halves(heads: int, half: int, cols: int) -> None:
    """Row i of a head's first half goes to 2i, row i of its second to 2i + 1, for weights and for biases."""
    x = np.arange(heads * 2 * half * cols, dtype=np.float32).reshape(heads * 2 * half, cols)
    found = reorder_heads(x, heads)
    for head in range(heads):
        for i in range(half):
            first, second = head * 2 * half + i, head * 2 * half + half + i
            assert np.array_equal(found[head * 2 * half + 2 * i], x[first])
            assert np.array_equal(found[head * 2 * half + 2 * i + 1], x[second])
    assert np.array_equal(reorder_heads(x[:, 0], heads), found[:, 0])
