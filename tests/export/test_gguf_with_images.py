"""Gemma 3 as it is published, a text model behind a vision tower: GGUF holds the text model, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from tests.export.gguf_cases import furthest, load, logits_of
from tests.export.tiny_llama import byte_level_tokenizer
from tests.export.tiny_models import randomize_vectors, tiny_config, token_ids
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export.gguf import GGUFReport, write_gguf
from whet.export.gguf_adapter import write_gguf_adapter
from whet.export.imatrix_measure import measure_imatrix
from whet.export.llama_cpp import Reading, read_logits
from whet.export.merge import save_merged
from whet.export.vocabulary import check_vocabulary

TOLERANCE = 1e-3  # Gemma's, see test_gguf_architectures.py
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
ADAPTED = r".*language_model.*\.(q_proj|down_proj)"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by transformers, whose files say `language_model.model.` where the model says `model.language_model.`"""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = byte_level_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = tiny_config("gemma3", {"vocab_size": len(tokenizer), **special}).to_dict()
    vision = {**VISION, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_vectors(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert any(name.startswith("language_model.model.") for name in load_file(folder / "model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def report(published: Path, tmp_path_factory: pytest.TempPathFactory) -> GGUFReport:
    return write_gguf(published, tmp_path_factory.mktemp("gguf") / "m.gguf", "f32")


def tuned(folder: Path) -> Any:
    """The model with an adapter on its text part that changes answers."""
    model: Any = get_peft_model(load(folder), LoraConfig(r=4, lora_alpha=8, target_modules=ADAPTED))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.eval()


@pytest.mark.usefixtures("llama_cpp")
def test_the_adapter_merged_and_beside_the_base_answers_as_trained(
    published: Path, report: GGUFReport, tmp_path: Path
) -> None:
    """Catches weights taken from under a wrong prefix, and an adapter whose layers are not found: one model, the base
    with a GGUF adapter on it, and the merged model, whose files have the other names."""
    model, tokens = tuned(published), token_ids(48)
    base, expected = logits_of(load(published), tokens), logits_of(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    adapter = write_gguf_adapter(tmp_path / "adapter", published, tmp_path / "adapter.gguf").path
    save_merged(model, tmp_path / "merged", byte_level_tokenizer(), dtype=torch.float32)
    merged = write_gguf(tmp_path / "merged", tmp_path / "merged.gguf", "f32").path
    readings = [Reading(report.path, tokens), Reading(report.path, tokens, adapter=adapter), Reading(merged, tokens)]
    plain, with_adapter, as_merged = read_logits(readings, threads=1)
    assert furthest(base, expected) > 20 * TOLERANCE
    assert furthest(plain, base) <= TOLERANCE
    assert furthest(with_adapter, expected) <= TOLERANCE
    assert furthest(as_merged, expected) <= TOLERANCE


def test_what_is_left_out_is_told(report: GGUFReport) -> None:
    """Catches a file that looks as if it read images."""
    assert any("vision tower is left out" in note for note in report.notes)
    assert not any("vision" in name or "mm" in name for name in report.types)


def test_names_of_both_kinds_give_one_file(published: Path, report: GGUFReport, tmp_path: Path) -> None:
    """Catches a checkpoint of a transformers that wrote the model's own names."""
    own = {
        name.replace("language_model.model.", "model.language_model.", 1): value
        for name, value in load_file(published / "model.safetensors").items()
    }
    for file in published.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    assert again.types == report.types
    assert again.path.stat().st_size == report.path.stat().st_size


def test_a_part_that_is_neither_text_nor_vision_is_refused(published: Path, tmp_path: Path) -> None:
    """Catches a tensor of the text model that is left out with the vision tower."""
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights["language_model.model.layers.0.extra.weight"] = torch.zeros(2, 2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WhetError, match=r"no place for, 1 tensors: model\.language_model\.layers\.0\.extra"):
        write_gguf(tmp_path, tmp_path / "m.gguf", "f32")


def test_vocabulary_and_importance_are_the_text_model_s(published: Path) -> None:
    """Catches a vocabulary size that is looked for beside the text model's, and matrices that are not measured."""
    assert check_vocabulary(published).rows == len(byte_level_tokenizer())
    sums = measure_imatrix(published, ["def f(x): return x\n" * 20], max_chunks=1).sums
    assert len(sums) == 7 * 7
