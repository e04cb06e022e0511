"""Gradients that the block adds to the parameters' own, as a trainer has it do, beside autograd's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.parity import harness
from whet import FastLanguageModel, SFTConfig, SFTTrainer
from whet.kernels.glu_lora import glu_backward_lora
from whet.models import block, fused


def passes(model: Any, rows: int, folder: Path, *, in_place: bool, heard: torch.nn.Parameter | None) -> int:
    """Passes of a trainer over two rows each, whose gradients stay; how many times those of `heard` were told of.

    In tiles of 13 tokens, so that gradients add up within a pass too.
    """
    shared, told = fused.shared_of(model), []
    assert shared is not None
    shared.tile = 13
    data = Dataset.from_list([{"input_ids": batch["input_ids"][0].tolist()} for batch in harness.batches(rows)])
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        bf16=False,
        report_to=[],
        max_length=64,
        use_cpu=True,
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=data)
    trainer.create_optimizer()
    if heard is not None:
        heard.register_post_accumulate_grad_hook(told.append)
    for batch in trainer.get_train_dataloader():
        items = torch.tensor(9.0)
        if in_place:
            trainer.training_step(model, batch, items)
            assert not shared.in_place, "for this trainer's passes only"
        else:
            model.train()
            trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
    return len(told)


@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("tied", ["llama", "gemma2"])
def test_gradients_added_where_they_stay_are_those_that_autograd_adds(
    checkpoint: Callable[..., Path], tied: str, listened: bool, tmp_path: Path
) -> None:
    """Two passes of a trainer. Catches a gradient that is added twice, lost where a head is tied to the embedding, or
    kept from a hook that waits for it."""
    found: list[dict[str, torch.Tensor]] = []
    heard = 0
    for in_place in (False, True):
        model, _ = FastLanguageModel.from_pretrained(
            str(checkpoint(tied)), full_finetuning=True, dtype=torch.float32, max_seq_length=64
        )
        weight = model.model.layers[0].mlp.up_proj.weight if listened else None
        heard += passes(model, 4, tmp_path, in_place=in_place, heard=weight)
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert heard == (4 if listened else 0)
    for name, gradient in found[0].items():
        assert harness.relative(found[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])  # q, k, v apart; with biases; one weight for all
@pytest.mark.parametrize("listened", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_the_adapters_gradients_are_those_that_autograd_adds(
    checkpoint: Callable[..., Path],
    family: str,
    listened: bool,
    together: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a gradient that goes to another part's adapter, is scaled twice or not at all, or is kept from a hook.

    Three passes: the first makes the gradients, others add to them. together: those of the MLP that a GPU sums in the
    activation's backward (kernels/glu_lora.py), in that order here too.
    """
    found: list[dict[str, torch.Tensor]] = []
    heard, ran, kernel = 0, [], glu_backward_lora
    for in_place in (False, True):
        monkeypatch.setattr(block, "takes", lambda *_, now=together and in_place: now)
        monkeypatch.setattr(block, "glu_backward_lora", lambda *args, **out: ran.append(kernel(*args, **out)))
        model = harness.whet_model(checkpoint(family), family, "nf4")
        harness.randomise_adapter(model)
        adapter = next(p for name, p in harness.adapter(model).items() if "up" in name or "o_proj" in name)
        heard += passes(model, 6, tmp_path, in_place=in_place, heard=adapter if listened else None)
        found.append({name: p.grad for name, p in harness.adapter(model).items() if p.grad is not None})
    assert heard == (6 if listened else 0)
    assert bool(ran) == (together and family != "phi3")  # which has one adapter for gate and up
    assert found[0].keys() == found[1].keys() == harness.adapter(model).keys()
    for name, gradient in found[0].items():
        assert harness.relative(found[1][name], gradient) < 1e-5, name
