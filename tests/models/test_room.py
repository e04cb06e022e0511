"""A base that is not quantized, moved to where its adapters can lie beside it, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.parity import harness
from tests.parity.families import FAMILIES, write_checkpoint
from whet.models import fused
from whet.models.weights import ApartWeights, BesideWeights


@pytest.fixture(params=["llama", "qwen2", "phi3"])  # q, k, v apart; with biases; one weight for all
def model(request: Any, tmp_path: Path) -> Any:
    family = request.param
    assert family in FAMILIES
    found = harness.whet_model(write_checkpoint(tmp_path, family), family, "fp32")
    harness.randomise_adapter(found)
    return found


def layers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, fused.FusedLayer)]


def weights_of(layer: Any) -> list[Any]:
    found = layer._whet_reader.read()
    assert not isinstance(found, str)
    return list(found.weights(torch.float32, torch.device("cpu")))


def test_gradients_are_the_same_and_the_weights_come_back(model: Any) -> None:
    """Catches a weight that is lost on the way, adapters of the step before, and rows that stay apart at the end."""
    shared = fused.shared_of(model)
    assert shared is not None
    batches = list(harness.batches(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = [harness.run(model, batch).gradients for batch in batches]
    assert any(isinstance(w, ApartWeights) for w in weights_of(layers(model)[0]))
    shared.room = True
    with fused.weights_held(model):
        for layer in layers(model):
            assert all(isinstance(w, BesideWeights) for w in weights_of(layer))
        for batch, gradients in zip(batches, expected, strict=True):
            for name, gradient in harness.run(model, batch).gradients.items():
                assert harness.relative(gradient, gradients[name]) < 1e-5, name
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]), name
        for parameter in harness.adapter(model).values():
            parameter.data.mul_(2)
        moved = harness.run(model, batches[0]).gradients
    for name, gradient in harness.run(model, batches[0]).gradients.items():
        assert harness.relative(moved[name], gradient) < 1e-5, name
    assert all(p.is_contiguous() for p in model.parameters())
    assert any(isinstance(w, ApartWeights) for w in weights_of(layers(model)[0]))


def test_each_weight_is_held_once(model: Any) -> None:
    """Catches the old memory held by whoever has read the layer before."""
    shared = fused.shared_of(model)
    assert shared is not None
    bases = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    harness.run(model, next(iter(harness.batches(1))))
    old = [StorageWeakRef(base.weight.untyped_storage()) for base in bases]
    shared.room = True
    with fused.weights_held(model):
        harness.run(model, next(iter(harness.batches(1))))
        assert all(storage.expired() for storage in old)
        per_layer = {base.weight.untyped_storage()._cdata for base in bases}
        assert len(per_layer) == 4 * len(layers(model)), "one piece of memory a projection"


def replaced(bases: list[Any]) -> None:
    bases[0].weight.data = bases[0].weight.data.clone() * 2


def switched(bases: list[Any]) -> None:
    bases[0].weight = torch.nn.Parameter(bases[0].weight.detach().clone() * 2, requires_grad=False)


@pytest.mark.parametrize("change", [replaced, switched])
def test_a_weight_that_is_replaced_meanwhile_is_used(model: Any, change: Callable[[list[Any]], None]) -> None:
    """Catches products with what lay there before."""
    shared = fused.shared_of(model)
    assert shared is not None
    shared.room = True
    batch = next(iter(harness.batches(1)))
    with fused.weights_held(model):
        harness.run(model, batch)
        change([m.base_layer for m in model.modules() if hasattr(m, "base_layer")])
        meanwhile = harness.run(model, batch).gradients
    shared.room = False
    for name, gradient in harness.run(model, batch).gradients.items():
        assert harness.relative(meanwhile[name], gradient) < 1e-5, name


def test_what_has_no_adapter_trains_or_is_quantized_stays(tmp_path: Path) -> None:
    model = harness.whet_model(write_checkpoint(tmp_path, "llama"), "llama", "nf4")
    shared = fused.shared_of(model)
    assert shared is not None
    shared.room = True
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with fused.weights_held(model):
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    plain = harness.whet_model(write_checkpoint(tmp_path / "16", "llama"), "llama", "fp32").unload()
    fused.shared_of(plain).room = True
    places = {name: p.data_ptr() for name, p in plain.named_parameters()}
    with fused.weights_held(plain):
        assert {name: p.data_ptr() for name, p in plain.named_parameters()} == places
