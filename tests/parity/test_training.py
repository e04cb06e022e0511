"""Twenty steps of training beside transformers + PEFT: losses, logits, every LoRA gradient, for seven families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.parity import harness

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_twenty_steps_in_fp32_agree(checkpoint: Checkpoint, family: str, base: str) -> None:
    """Catches a wrong mask, window, cap, scale, rope or bias, and a gradient that is lost on the way to an adapter."""
    folder = checkpoint(family)
    worst = harness.free_run(harness.whet_model(folder, family, base), harness.plain_model(folder, family, base))
    assert worst.largest() <= 1e-5, worst


@pytest.mark.parametrize(("base", "exact"), [("bf16", "fp32"), ("nf4-bf16", "nf4")])
def test_bf16_is_no_further_from_fp32_than_transformers_is(
    checkpoint: Checkpoint, family: str, base: str, exact: str
) -> None:
    """Catches a softmax, norm, adapter or loss that dropped to bf16 where transformers keeps fp32.

    Both programs round, in different places, so neither equality nor a fixed tolerance says who is right. Distances
    from fp32 do. Over 20 steps logits and gradients are thousands of numbers, whose distances differ between two
    equally good programs by up to 2% (measured); 5% is allowed. Losses are 20 numbers, whose distances' ratio is 0.6
    to 1.8 by the adapter that is drawn; twice is allowed, where a loss rounded to bf16 is off by five times.
    """
    folder = checkpoint(family, torch.bfloat16)
    ours, theirs = harness.rounding(
        harness.whet_model(folder, family, base),
        harness.plain_model(folder, family, base),
        harness.plain_model(folder, family, exact),
    )
    assert ours.logits <= 1.05 * theirs.logits, (ours, theirs)
    assert ours.gradients <= 1.05 * theirs.gradients, (ours, theirs)
    assert ours.loss <= 2 * theirs.loss, (ours, theirs)


def test_the_harness_sees_one_weight_off_by_a_thousandth(checkpoint: Checkpoint) -> None:
    """Catches a comparison that can't fail: one norm weight, changed by 1e-3 of itself, must show."""
    folder = checkpoint("llama")
    ours, theirs = (build(folder, "llama", "fp32") for build in (harness.whet_model, harness.plain_model))
    norm = ours.get_base_model().model.layers[0].input_layernorm.weight
    norm.data[0] *= 1 + 1e-3
    worst = harness.free_run(ours, theirs, steps=3)
    assert worst.gradients > 1e-5
    assert worst.logits > 1e-5


def test_the_adapter_starts_as_peft_starts_it(checkpoint: Checkpoint, family: str) -> None:
    """Catches an initialisation of our own: the same seed must draw the same A, and B must be zero."""
    folder = checkpoint(family)
    ours = harness.adapter(harness.whet_model(folder, family, "nf4"))
    theirs = harness.adapter(harness.plain_model(folder, family, "nf4"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(p.dtype == torch.float32 for p in ours.values())


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_recomputing_layers_changes_no_gradient(checkpoint: Checkpoint, family: str, base: str) -> None:
    """Catches recomputation that loses the documents' boundaries: the backward pass must see the same attention."""
    from whet import FastLanguageModel

    model = harness.whet_model(checkpoint(family), family, base)
    harness.randomise_adapter(model)
    for batch in harness.batches(3):
        kept = harness.run(FastLanguageModel.for_training(model, use_gradient_checkpointing=False), batch)
        recomputed = harness.run(FastLanguageModel.for_training(model, use_gradient_checkpointing="whet"), batch)
        assert torch.equal(kept.loss, recomputed.loss)
        assert all(torch.equal(kept.gradients[name], g) for name, g in recomputed.gradients.items())
