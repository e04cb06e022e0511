"""Training every weight beside transformers: losses, logits, and the gradient of each parameter, for seven families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.parity import harness
from tests.parity.families import FAMILIES
from whet import FastLanguageModel
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
