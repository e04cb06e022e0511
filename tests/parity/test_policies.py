"""What layers keep, and how many tokens go through a weight at once, change no loss, logit or gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import harness
from whet.models import activations, fused
from whet.models.activations import Policy
from whet.models.block import Block


@pytest.mark.parametrize("policy", ["ALL", "MOST", "ATTENTION", "INPUT"])
def test_every_policy_trains_as_transformers_does(
    checkpoint: Callable[..., Path], family: str, policy: str, through_block: list[Block]
) -> None:
    """Catches a value computed again from the wrong inputs, and a tile's gradient that is lost or counted twice.

    Tiles of 13 tokens cut every batch unevenly, and documents in the middle.
    """
    folder = checkpoint(family)
    ours, theirs = harness.whet_model(folder, family, "nf4"), harness.plain_model(folder, family, "nf4")
    shared = fused.shared_of(ours)
    assert shared is not None
    shared.policy, shared.tile = getattr(activations, policy), 13
    assert harness.free_run(ours, theirs, steps=3).largest() <= 1e-5
    assert len(through_block) == 6, "full, padded and packed rows go through the block, in both layers"


def test_a_plan_may_differ_from_layer_to_layer(checkpoint: Callable[..., Path]) -> None:
    """Catches a policy that is read for another layer than it was made for."""
    folder = checkpoint("llama")
    ours, theirs = harness.whet_model(folder, "llama", "fp32"), harness.plain_model(folder, "llama", "fp32")
    shared = fused.shared_of(ours)
    assert shared is not None
    shared.layers = (activations.INPUT, activations.ALL)
    kept: list[Policy] = [layer._whet.policy_of(layer._whet_index) for layer in ours.base_model.model.model.layers]
    assert kept == [activations.INPUT, activations.ALL]
    assert harness.free_run(ours, theirs, steps=3).largest() <= 1e-5
