"""Steps layer by layer on a GPU, where the backward pass runs in a thread of its own."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.families import write_checkpoint
from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.models import fused
from whet.models.activations import ALL
from whet.train import sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 12


def folder_of(tmp_path: Path) -> Path:
    """The tokenizer of the tiny checkpoint, and a Llama most of whose weights lie in its layers: 38M values."""
    folder = write_checkpoint(tmp_path, "llama")
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=LAYERS, **shape)).bfloat16().save_pretrained(
        folder
    )
    return folder


def test_the_same_training_in_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gradients that are kept to the end, and an update that another stream or thread makes too early."""
    rows = Dataset.from_list([{"input_ids": [3 + (7 * i + j) % 60 for j in range(64)]} for i in range(16)])
    folder = folder_of(tmp_path)
    allowed, losses, peaks = sft.allowed, [], []
    for on in (False, True):
        monkeypatch.setattr(sft, "allowed", allowed if on else lambda args: False)
        model, _ = FastLanguageModel.from_pretrained(
            str(folder), full_finetuning=True, dtype=torch.bfloat16, max_seq_length=64
        )
        config = SFTConfig(
            output_dir=str(tmp_path / "out"), optim="adamw_8bit", max_grad_norm=0.0, max_steps=8, learning_rate=1e-3,
            per_device_train_batch_size=1, gradient_accumulation_steps=1, logging_steps=1, save_strategy="no",
            report_to=[], max_length=64, bf16=True,
        )  # fmt: skip
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows)
        shared = fused.shared_of(model)
        assert shared is not None
        shared.policy, shared.layers = ALL, None
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        assert (trainer._layerwise is not None) == on
        peaks.append(torch.cuda.max_memory_allocated())
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        weights = sum(p.numel() * p.element_size() for layer in model.model.layers for p in layer.parameters())
        del trainer, model, shared
        gc.collect()  # a trainer refers to itself
        torch.cuda.empty_cache()
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < losses[1][0]
    assert peaks[0] - peaks[1] > 0.5 * weights * (LAYERS - 2) / LAYERS
