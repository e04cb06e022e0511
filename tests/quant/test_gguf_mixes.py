"""Mixtures: every tensor gets the type that llama.cpp's own quantizer gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.export.llama_quantize import Job, quantize
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.quant.gguf_mixes import MIXES, ModelFacts, check_quantization, fitting_type, wanted_type

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def facts(architecture: str = "llama", layers: int = 17, kv_heads: int = 2, tied: bool = False) -> ModelFacts:
    return ModelFacts(architecture, layers, 8, kv_heads, tied)


# Seventeen layers: the smallest number with a first sixteenth.
MODELS = {
    "llama": facts(),
    "llama, a head of values to each": facts(kv_heads=8),
    "llama of two layers": facts(layers=2),
    "qwen2": facts("qwen2", tied=True),
    "qwen3": facts("qwen3"),
    "gemma2": facts("gemma2", tied=True),
    "gemma3": facts("gemma3", tied=True),
    "phi3": facts("phi3"),
}
# llama.cpp tells some 70B models by their 80 layers, and gives them more bits for values.
LARGE = {
    f"{architecture}, {kv_heads}": facts(architecture, 80, kv_heads)
    for architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
    for kv_heads in (2, 8)
}


def _names(model: ModelFacts) -> list[str]:
    parts = FUSED if model.architecture == "phi3" else PARTS
    if model.layers == 80:
        parts = tuple(part for part in parts if part in ("attn_v", "attn_qkv"))
    layers = [f"blk.{layer}.{part}.weight" for layer in range(model.layers) for part in parts]
    return ["token_embd.weight", *layers, *([] if model.tied else ["output.weight"])]


def _save(path: Path, model: ModelFacts, cols: int) -> None:
    """A GGUF with the hyperparameters llama.cpp asks for before it quantizes, and a row of each tensor."""
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(cols)
    writer.add_feed_forward_length(cols)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_scaling_orig_ctx_len(512)
    writer.add_sliding_window(256)
    row = np.linspace(-1, 1, cols, dtype=np.float32)
    for name in _names(model):
        writer.add_tensor(name, np.stack([row, row]))  # one row alone would be a vector
    writer.add_tensor("output_norm.weight", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


def _ours(quantization: str, model: ModelFacts, cols: int) -> dict[str, str]:
    types = {name: fitting_type(wanted_type(quantization, name, 2, model), cols) for name in _names(model)}
    return types | {"output_norm.weight": wanted_type(quantization, "output_norm.weight", 1, model)}


def _compare(models: Mapping[str, ModelFacts], quantizations: Iterable[str], folder: Path) -> None:
    """All models and quantizations, by one process."""
    jobs = {}
    for place, (label, model) in enumerate(models.items()):
        source = folder / f"{place}.gguf"
        _save(source, model, 256)
        importance = {name: np.ones(256) for name in _names(model)} if model.imatrix else {}
        for name in quantizations:
            jobs[label, name] = Job(source, folder / f"{place}-{name}.gguf", MIXES[name].file_type, importance)
    assert all(quantize(list(jobs.values()), folder))
    for (label, name), job in jobs.items():
        assert _ours(name, models[label], 256) == _types(job.out), (label, name)


@pytest.mark.usefixtures("llama_cpp")
def test_types_are_llama_cpps(tmp_path):
    """Catches a wrong rule, a layer that is off by one, and a rule of one architecture applied to another."""
    _compare(MODELS, MIXES, tmp_path)


@pytest.mark.usefixtures("llama_cpp")
def test_types_of_80_layers_are_llama_cpps(tmp_path):
    """Catches values of a 70B model at three bits."""
    _compare(LARGE, ["q2_k", "q4_k_s"], tmp_path)


@pytest.mark.usefixtures("llama_cpp")
def test_types_with_an_importance_matrix_are_llama_cpps(tmp_path):
    """Catches bits spent, or saved, as if there were none: Q4_0, Q5_0 and IQ4_NL ask."""
    _compare({"llama": replace(facts(), imatrix=True)}, MIXES, tmp_path)


@pytest.mark.parametrize("cols", [288, 100])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.usefixtures("llama_cpp")
def test_types_of_rows_that_do_not_divide_are_llama_cpps(cols, tied, tmp_path):
    """Catches another fallback. What llama.cpp refuses, rows that do not divide into 32 weights, gets F16."""
    model = facts(layers=2, tied=tied)
    _save(tmp_path / "model.gguf", model, cols)
    jobs = {name: Job(tmp_path / "model.gguf", tmp_path / f"{name}.gguf", mix.file_type) for name, mix in MIXES.items()}
    for (name, job), done in zip(jobs.items(), quantize(list(jobs.values()), tmp_path), strict=True):
        ours = _ours(name, model, cols)
        if done:
            assert ours == _types(job.out), name
        else:
            assert cols % 32 != 0
            assert "f16" in ours.values()


def test_file_types_are_those_of_their_names():
    """Catches metadata that calls a file by another quantization's name."""
    for name, mix in MIXES.items():
        if name != "f32":
            assert mix.file_type.name.removeprefix("MOSTLY_").lower() == name
    assert MIXES["f32"].file_type.name == "ALL_F32"


def test_unknown_quantization_names_the_known_ones():
    with pytest.raises(WhetError, match=r"q5_9(.|\n)*q4_k_m"):
        check_quantization("q5_9")
