"""Training every weight beside transformers: losses, logits, and the gradient of each parameter, for seven families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.parity import harness
from tests.parity.families import FAMILIES
from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.models import activations, fused
from whet.models.block import Block


def worst(ours: Any, theirs: Any) -> harness.Differences:
    """The largest differences over full, padded and packed batches, at the same weights.

    No optimizer steps between: AdamW turns the rounding of gradients near zero into whole steps.
    """
    found = harness.Differences()
    for batch in harness.batches(3):
        found |= harness.differences(harness.run(ours.train(), batch), harness.run(theirs.train(), batch))
    return found


@pytest.mark.parametrize("policy", ["ALL", "INPUT"])
def test_every_weight_trains_as_in_transformers(
    checkpoint: Callable[..., Path], family: str, policy: str, through_block: list[Block]
) -> None:
    """Catches a weight, bias or norm whose gradient is lost, summed over the wrong tokens, or given to another."""
    folder = checkpoint(family)
    ours, _ = FastLanguageModel.from_pretrained(str(folder), full_finetuning=True, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=FAMILIES[family].plain_attention
    )
    shared = fused.shared_of(ours)
    assert shared is not None
    shared.policy, shared.tile = getattr(activations, policy), 13
    assert worst(ours, theirs).largest() <= 1e-5
    assert len(through_block) == 6, "full, padded and packed rows go through the block, in both layers"


def test_some_weights_train_and_others_do_not(checkpoint: Callable[..., Path]) -> None:
    """Catches a gradient that goes to the next parameter in line when one in between is frozen."""
    folder = checkpoint("qwen2")
    ours, _ = FastLanguageModel.from_pretrained(str(folder), full_finetuning=True, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("k_proj" in name or "up_proj" in name or "0.post_attention" in name)
    assert worst(ours, theirs).largest() <= 1e-5


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("tied", ["llama", "gemma2"])
def test_gradients_added_where_they_stay_are_those_that_autograd_adds(
    checkpoint: Callable[..., Path], tied: str, listened: bool, tmp_path: Path
) -> None:
    """Two passes of a trainer. Catches a gradient that is added twice, lost where a head is tied to the embedding, or
    kept from a hook that waits for it."""
    rows = Dataset.from_list([{"input_ids": batch["input_ids"][0].tolist()} for batch in harness.batches(4)])
    found: list[dict[str, torch.Tensor]] = []
    heard: list[str] = []
    for in_place in (False, True):
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(checkpoint(tied)), full_finetuning=True, dtype=torch.float32, max_seq_length=64
        )
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
        trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        trainer.create_optimizer()
        if listened:
            weight = model.model.layers[0].mlp.up_proj.weight
            weight.register_post_accumulate_grad_hook(lambda p: heard.append("up_proj"))
        for batch in trainer.get_train_dataloader():
            items = torch.tensor(9.0)
            if in_place:
                trainer.training_step(model, batch, items)
                assert not shared.in_place, "for this trainer's passes only"
            else:
                model.train()
                trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert len(heard) == (4 if listened else 0)
    for name, gradient in found[0].items():
        assert harness.relative(found[1][name], gradient) < 1e-5, name
