"""The base's products in FP8: near the same training in fp32, and not the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import harness
from tests.parity.families import write_checkpoint
from whet.models import fused

SHAPE = {"hidden_size": 256, "intermediate_size": 512}  # q, k, v in whole groups of blocks, so that they are one weight


def test_fp8_products_stay_near_those_in_fp32(tmp_path: Path, family: str) -> None:
    """Catches a scale of the wrong row, a weight transposed, adapters or biases lost beside FP8 products.

    One E4M3 operand is off by up to 6% a value; these random models, which attend sharply, make of it a third of the
    worst adapter's gradient. A lost adapter or a wrong scale makes all of it.
    """
    shape = SHAPE | ({} if family == "phi3" else {"head_dim": 64})
    model = harness.whet_model(write_checkpoint(tmp_path, family, **shape), family, "nf4")
    harness.randomise_adapter(model)
    shared = fused.shared_of(model)
    assert shared is not None
    batch = next(harness.batches(1))
    exact = harness.run(model, batch)
    shared.fp8 = True
    near = harness.differences(harness.run(model, batch), exact)
    assert 1e-4 < near.logits < 0.15, near
    assert near.loss < 0.05, near
    assert 1e-3 < near.gradients < 0.5, near


def test_a_layer_that_cannot_have_fp8_says_so(
    checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches FP8 that was asked for and is not there, in silence."""
    model = harness.whet_model(checkpoint("llama"), "llama", "nf4")
    shared = fused.shared_of(model)
    assert shared is not None
    shared.fp8 = True
    with caplog.at_level(logging.WARNING, logger="whet"):
        harness.run(model, next(harness.batches(1)))
    assert caplog.text.count("16 bits, not FP8") == 1
