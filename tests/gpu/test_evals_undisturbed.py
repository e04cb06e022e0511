"""Evaluation between recorded training passes: the graph goes on reading weights that are still there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.evals.heldout import mean_loss
from whet.evals.models import Generation, InMemory, Prompt
from whet.models import activations, fused

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH = 128


class Evaluates(TrainerCallback):
    """After each step everything that an evaluation does; what it frees is filled with other numbers."""

    def __init__(self, asked: InMemory):
        self.asked = asked

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        asked = [Prompt(text=f"Count to {n}") for n in range(8)]
        self.asked.generate(asked, Generation(max_new_tokens=16, temperature=1.0))
        self.asked.choice_logprobs(asked, [[" one", " two and three"]] * len(asked))
        mean_loss(self.asked.model, [{"input_ids": list(range(4, 100)), "labels": list(range(4, 100))}])
        junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(256)]
        del junk


@dataclass(frozen=True)
class Trained:
    """losses: of each step. captures: how many times a pass was recorded. sums: of the base's bytes, before and after
    training, by name."""

    losses: list[float]
    captures: int
    before: dict[str, int]
    after: dict[str, int]


def sums(model: nn.Module) -> dict[str, int]:
    frozen = {name: x for name, x in model.named_parameters() if not x.requires_grad} | dict(model.named_buffers())
    return {name: int(x.detach().reshape(-1).view(torch.uint8).long().sum()) for name, x in frozen.items()}


def trained(folder: Path, *, evaluate: bool) -> Trained:
    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny", max_seq_length=LENGTH, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8)
    shared = fused.shared_of(model)
    assert shared is not None
    shared.policy, shared.auto, shared.held = activations.ALL, False, shared.config.num_hidden_layers
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 400, (LENGTH,), generator=draw).tolist() for _ in range(60)]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), max_length=LENGTH, per_device_train_batch_size=2, gradient_accumulation_steps=3,
            max_steps=8, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], seed=3,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        callbacks=[Evaluates(InMemory(model, tokenizer))] if evaluate else [],
    )  # fmt: skip
    before = sums(model)
    trainer.train()
    assert trainer._passes is not None
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Trained(losses, trainer._passes.captures, before, sums(model))


def test_a_recorded_pass_does_not_notice_an_evaluation(tmp_path: Path) -> None:
    """Catches held weights that an evaluation lets go, whose memory the graph reads; and a graph recorded anew."""
    plain = trained(tmp_path, evaluate=False)
    evaluated = trained(tmp_path, evaluate=True)
    assert plain.before == evaluated.before == plain.after == evaluated.after, "the base is not what was loaded"
    assert plain.captures == evaluated.captures == 1
    assert len(plain.losses) == 8
    assert evaluated.losses == pytest.approx(plain.losses, rel=1e-4)
