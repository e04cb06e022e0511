"""Gradients of adapters that the block adds to the parameters' own, as a trainer has it do, beside autograd's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.parity import harness
from whet import SFTConfig, SFTTrainer
from whet.models import fused


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])  # q, k, v apart; with biases; one weight for all
@pytest.mark.parametrize("listened", [False, True])
def test_the_adapters_gradients_are_those_that_autograd_adds(
    checkpoint: Callable[..., Path], family: str, listened: bool, tmp_path: Path
) -> None:
    """Catches a gradient that goes to another part's adapter, is scaled twice or not at all, or is kept from a hook.

    Three passes: the first makes the gradients, others add to them. Tiles of 13 tokens add within a pass.
    """
    rows = Dataset.from_list([{"input_ids": batch["input_ids"][0].tolist()} for batch in harness.batches(6)])
    found: list[dict[str, torch.Tensor]] = []
    heard: list[str] = []
    for in_place in (False, True):
        model = harness.whet_model(checkpoint(family), family, "nf4")
        harness.randomise_adapter(model)
        shared = fused.shared_of(model)
        assert shared is not None
        shared.tile = 13
        config = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            bf16=False,
            report_to=[],
            max_length=64,
            use_cpu=True,
        )
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows)
        if listened:
            adapter = next(p for name, p in harness.adapter(model).items() if "up" in name or "o_proj" in name)
            adapter.register_post_accumulate_grad_hook(lambda p: heard.append("heard"))
        for batch in trainer.get_train_dataloader():
            items = torch.tensor(9.0)
            if in_place:
                trainer.training_step(model, batch, items)
            else:
                model.train()
                trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
        found.append({name: p.grad for name, p in harness.adapter(model).items() if p.grad is not None})
    assert len(heard) == (6 if listened else 0)
    assert found[0].keys() == found[1].keys() == harness.adapter(model).keys()
    for name, gradient in found[0].items():
        assert harness.relative(found[1][name], gradient) < 1e-5, name
