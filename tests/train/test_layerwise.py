"""Steps layer by layer: the same training to the bit, with one layer's gradients at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.parity.families import write_checkpoint
from tests.train.setups import common
from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.train import layerwise, sft
from whet.train.layerwise import Layerwise

ROWS = Dataset.from_list([{"input_ids": [3 + (7 * i + j) % 60 for j in range(20 + i)]} for i in range(12)])


@pytest.fixture(scope="module", params=["llama", "gemma2"])  # head apart, and tied to the embedding
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def model_of(folder: Path, dtype: torch.dtype = torch.float32, *, full: bool = True) -> Any:
    model, _ = FastLanguageModel.from_pretrained(str(folder), full_finetuning=full, dtype=dtype, max_seq_length=64)
    return model if full else FastLanguageModel.get_peft_model(model, r=4)


def trainer_of(model: Any, folder: Path, **settings: Any) -> SFTTrainer:
    usual = {"optim": "adamw_8bit", "max_grad_norm": 0.0, "max_steps": 3, "learning_rate": 1e-3, "use_cpu": True}
    config = SFTConfig(**common(folder, **{**usual, **settings}), bf16=False, max_length=64)
    return SFTTrainer(model=model, args=config, train_dataset=ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_training_is_the_same(
    checkpoint: Path, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a weight that is updated twice or not at all, before its gradient is whole (a tied head's), with another
    step's rate, or rounded by other random bits; and a norm of the gradients that were left."""
    most: list[int] = []
    update = Layerwise.__call__

    def counted(self: Layerwise, layer: int) -> None:
        update(self, layer)
        most.append(sum(any(p.grad is not None for p in layer) for layer in self.layers))

    monkeypatch.setattr(Layerwise, "__call__", counted)
    found = []
    for on in (False, True):
        monkeypatch.setattr(sft, "allowed", layerwise.allowed if on else lambda args: False)
        trainer = trainer_of(model_of(checkpoint, dtype), tmp_path)
        trainer.train()
        assert (trainer._layerwise is not None) == on == bool(most)
        found.append((trainer.model.state_dict(), trainer.state.log_history))
    (plain, log), (ours, our_log) = found
    assert [name for name, x in plain.items() if not torch.equal(x, ours[name])] == []
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in (log, our_log)]
    assert len(norms[0]) == 3
    assert norms[1] == pytest.approx(norms[0], rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert max(most) == 0, "when a layer begins, those above have none, and it has not made its own"


@pytest.mark.parametrize(
    ("settings", "full"),
    [
        ({"max_grad_norm": 1.0}, True),
        ({"gradient_accumulation_steps": 2}, True),
        ({"optim": "adamw_torch"}, True),
        ({}, False),
    ],
)
def test_where_a_step_needs_all_gradients_it_has_them(
    checkpoint: Path, settings: dict[str, Any], full: bool, tmp_path: Path
) -> None:
    """Catches gradients that were let go before they were limited or summed, and adapters that gain nothing."""
    trainer = trainer_of(model_of(checkpoint, full=full), tmp_path, **settings)
    trainer.create_optimizer()
    assert trainer._layerwise is None


def test_a_copy_of_the_model_updates_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a copied model's backward pass that steps the first one's optimizer."""
    trainer = trainer_of(model_of(checkpoint), tmp_path, max_steps=1)
    trainer.train()
    copied = copy.deepcopy(trainer.model)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    copied(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(torch.equal(x, before[name]) for name, x in trainer.model.state_dict().items())
    assert copied.model.layers[0].mlp.up_proj.weight.grad is not None
