"""The plan put to use: what it is asked, what it changes in a trainer's config and in the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parity.families import write_checkpoint
from whet import FastLanguageModel
from whet.models import fused
from whet.models.activations import ALL, INPUT, MOST
from whet.plan import fit, memory
from whet.plan.memory import GIB, Plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    loaded, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, gpu_memory="2GiB")
    return FastLanguageModel.get_peft_model(loaded, r=4)


def config(**values: Any) -> SimpleNamespace:
    usual = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_length": 32,
        "optim": "adamw_8bit",
    }
    return SimpleNamespace(**usual | values)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan | None], list[Any]]:
    """planned(plan): a GPU seems to be there, and planning gives `plan`; returns what was asked."""

    def give(plan: Plan | None) -> list[Any]:
        asked: list[Any] = []

        def answer(model: Any, passes: list[int], length: int, **options: Any) -> Plan | None:
            asked.append((passes, length, options))
            return plan

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(fit, "plan", answer)
        return asked

    return give


def test_every_way_to_cut_a_step_is_offered_and_the_chosen_one_set(model: Any, planned: Any) -> None:
    """Catches a step that gets other rows than it was asked for, and a plan that stays on paper."""
    asked = planned(Plan(32, 512, (INPUT, MOST), GIB, 1e-6))
    settings = config()
    fit.fit_to_memory(model, settings, 3.0 * GIB)
    options = {"optimizer": "adamw_8bit", "budget": 3.0 * GIB, "recorded": False, "layerwise": False}
    assert asked == [([32, 64, 96, 192], 32, options)]
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (1, 6)
    shared = fused.shared_of(model)
    assert shared is not None
    assert (shared.layers, shared.tile) == ((INPUT, MOST), 512)
    assert (
        shared.plan == "1 rows at a time, 6 times a step; peak 1.00 GiB, 0.00 of it all the time; "
        "layers keep: 1 input, 1 most; tiles of 512 tokens"
    )


def test_rows_cut_to_the_model_s_length_are_planned_at_that_length(model: Any, planned: Any) -> None:
    asked = planned(Plan(64, 512, (ALL, ALL), GIB, 1e-6))
    fit.fit_to_memory(model, config(max_length=None, gradient_accumulation_steps=1), None)
    assert asked[0][:2] == ([64, 128], 64)


def test_nothing_changes_where_nothing_can_be_planned(
    model: Any, planned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(None)
    settings = config()
    assert fit.fit_to_memory(model, settings, None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fit.fit_to_memory(model, settings, None) is None
    assert settings == config()


def test_sizes_are_read_from_the_model(model: Any) -> None:
    """Catches a rank, width or count that the plan has from elsewhere."""
    sizes = fit.sizes_of(model)
    assert sizes is not None
    assert (sizes.layers, sizes.vocabulary, sizes.rank, sizes.bits) == (2, 128, 4, 4)
    assert (sizes.q, sizes.qkv, sizes.layer_weights) == (64, 128, 64 * 128 + 64 * 64 + 3 * 64 * 128)
    assert not sizes.trained
    assert not sizes.trained_head
    shared = fused.shared_of(model)
    assert shared is not None
    assert shared.budget == 2 * GIB


def test_full_fine_tuning_is_seen(tmp_path: Path) -> None:
    full, _ = FastLanguageModel.from_pretrained(str(write_checkpoint(tmp_path, "llama")), full_finetuning=True)
    sizes = fit.sizes_of(full)
    assert sizes is not None
    assert sizes.trained
    assert sizes.trained_head
    assert sizes.rank == 0


def test_a_model_that_is_not_fused_has_no_plan(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    eight_bit, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, load_in_8bit=True)
    assert fit.sizes_of(eight_bit) is None


def test_updates_layer_by_layer_are_planned_for_the_whole_step_s_pass_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gradients of all layers counted where one layer's are there, or one layer's where a step has passes."""
    loaded, _ = FastLanguageModel.from_pretrained(
        str(write_checkpoint(tmp_path, "llama")), full_finetuning=True, dtype=torch.float32, max_seq_length=64
    )
    asked: list[tuple[float, list[int], float]] = []

    def choose(sizes: Any, device: Any, budget: float, static: float, passes: list[int], *_: Any) -> Plan:
        asked.append((static, passes, device.launch))
        return Plan(max(passes), 512, (ALL, ALL), GIB, len(asked) * 1e-6)

    monkeypatch.setattr(memory, "choose", choose)
    monkeypatch.setattr(fit, "device_rates", lambda device: memory.HOPPER)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, GIB))
    options = {"optimizer": "adamw_8bit", "budget": None, "recorded": True}
    chosen = fit.plan(loaded, [32, 192, 64], 32, **options, layerwise=True)
    (static, passes, launch), (layerwise, whole, slower) = asked
    assert (passes, launch) == ([32, 64], 0.0)
    assert (whole, slower) == ([192], memory.HOPPER.launch)
    layers = [sum(4 * p.numel() for p in layer.parameters()) for layer in loaded.model.layers]
    assert static - layerwise == sum(layers) - max(layers)
    assert chosen is not None
    assert chosen.tokens == 64
    asked.clear()
    fit.plan(loaded, [192], 32, **options, layerwise=True)
    assert [passes for _, passes, _ in asked] == [[192]]
