"""Passes recorded as a CUDA graph train as passes that run one kernel at a time, and let their memory go."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.models import activations, fused
from whet.train import sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH = 128


def rows(lengths: list[int]) -> Dataset:
    draw = torch.Generator().manual_seed(1)
    return Dataset.from_dict({"input_ids": [torch.randint(4, 400, (n,), generator=draw).tolist() for n in lengths]})


def trainer_on(
    folder: Path,
    lengths: list[int],
    *,
    evaluated: list[int] | None = None,
    full: bool = False,
    policy: Any = activations.ALL,
    **settings: Any,
) -> SFTTrainer:
    """On rows of these lengths, with an evaluation on rows of the lengths `evaluated` where given."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        "builtin:tiny", max_seq_length=LENGTH, load_in_4bit=not full, full_finetuning=full
    )
    if not full:
        model = FastLanguageModel.get_peft_model(model, r=8)
    shared = fused.shared_of(model)
    assert shared is not None
    shared.policy, shared.auto = policy, False
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_length": LENGTH,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "optim": "adamw_8bit",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }
    config = SFTConfig(**defaults | settings)
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=rows(lengths),
        eval_dataset=None if evaluated is None else rows(evaluated),
        processing_class=tokenizer,
    )


def trained(trainer: SFTTrainer) -> tuple[list[float], int]:
    """The losses, and how many times a pass was recorded."""
    trainer.train()
    captures = 0 if trainer._passes is None else trainer._passes.captures
    assert trainer._passes is None or trainer._passes.graph is None, "let go at the end"
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], captures


FULL_ROWS, MIXED = [LENGTH] * 60, [5, 100, 37, 90, 128, 20, 63, 64] * 40


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        (FULL_ROWS, {}),
        (FULL_ROWS, {"policy": replace(activations.MOST, offload=True)}),
        (FULL_ROWS, {"gradient_accumulation_steps": 1}),
        (FULL_ROWS, {"full": True, "learning_rate": 1e-4}),
        (MIXED, {"packing": True, "per_device_train_batch_size": 4}),
    ],
)
def test_recorded_passes_train_like_others(
    tmp_path: Path, lengths: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gradients that are lost or added twice, stale batches, and buffers that two passes write to."""
    losses, captures = trained(trainer_on(tmp_path, lengths, **options))
    assert captures >= 1
    monkeypatch.setattr(sft, "obstacle", lambda model: "for comparison")
    expected, none = trained(trainer_on(tmp_path, lengths, **options))
    assert none == 0
    assert losses == pytest.approx(expected, rel=5e-3)
    assert losses[-1] < losses[0]


def test_the_host_waits_for_nothing_within_a_step(tmp_path: Path) -> None:
    """Catches a wait in passes, the count of tokens, clipping or the optimizer: the GPU would idle after it."""

    class NoWaiting(TrainerCallback):
        watched = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= 3:  # passes are recorded, the optimizer is laid out
                torch.cuda.set_sync_debug_mode("error")
                self.watched += 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer = trainer_on(tmp_path, FULL_ROWS, include_num_input_tokens_seen="non_padding")
    callback = NoWaiting()
    trainer.add_callback(callback)
    try:
        _, captures = trained(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captures == 1
    assert callback.watched == 3
    assert trainer.state.num_input_tokens_seen == 6 * 6 * LENGTH


def test_batches_without_one_form_are_not_recorded(tmp_path: Path) -> None:
    losses, captures = trained(trainer_on(tmp_path, [17 + 7 * i % 91 for i in range(60)]))
    assert captures == 0
    assert len(losses) == 6


def test_another_form_lets_the_graph_go_and_a_steady_one_is_recorded_again(tmp_path: Path) -> None:
    """The last batch of an epoch is smaller: catches a graph replayed on it, and memory of two at one time."""
    trainer = trainer_on(tmp_path, [LENGTH] * 31, gradient_accumulation_steps=1, max_steps=-1, num_train_epochs=2)
    losses, captures = trained(trainer)
    assert captures == 2
    assert len(losses) == 32
    allocated = torch.cuda.memory_allocated()
    del trainer
    assert torch.cuda.memory_reserved() < allocated + 2**30


def test_evaluation_between_passes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2}

    def losses() -> tuple[list[float], list[float], int]:
        trainer = trainer_on(tmp_path, FULL_ROWS, evaluated=[LENGTH] * 4, **settings)
        found, captures = trained(trainer)
        return found, [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line], captures

    found, evaluated, captures = losses()
    assert captures >= 1
    monkeypatch.setattr(sft, "obstacle", lambda model: "for comparison")
    expected, expected_evaluated, _ = losses()
    assert found == pytest.approx(expected, rel=5e-3)
    assert evaluated == pytest.approx(expected_evaluated, rel=5e-3)


def test_a_pass_that_can_t_be_recorded_runs_as_it_is_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for the GPU within the pass. Catches a failure that ends training, or leaves random numbers unusable,
    or all further work of this thread on the recording's stream."""
    trainer = trainer_on(tmp_path, FULL_ROWS)
    monkeypatch.setattr(sft, "obstacle", lambda model: None)
    trainer.model.get_base_model().model.norm.register_forward_hook(
        lambda module, given, out: out * out.new_ones(1).item()
    )
    with caplog.at_level(logging.WARNING):
        losses, captures = trained(trainer)
    assert captures == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert "could not be recorded" in caplog.text
    assert losses[-1] < losses[0]
    torch.rand(3, device="cuda")
