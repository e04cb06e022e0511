"""Batches as whet's collator makes them, and the forms in which a CUDA graph takes them. tests/gpu records graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import whet
from whet.models.head import IGNORED
from whet.train.collator import PaddingFree
from whet.train.pass_graph import DOCUMENTS, Form, PassGraph, obstacle

Batch = dict[str, Any]


def batch_of(lengths: list[int], whole: int = 0, labelled: float = 1.0) -> Batch:
    """Documents of these lengths, random, in one batch of whet's collator, with a count of its labels."""
    draw = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for n in lengths:
        ids = torch.randint(4, 120, (n,), generator=draw)
        keep = torch.rand(n, generator=draw) < labelled
        rows.append({"input_ids": ids.tolist(), "labels": torch.where(keep, ids, IGNORED).tolist()})
    batch = PaddingFree(pad_token_id=0, padding_free=True, whole=whole)(rows)
    return {**batch, "num_items_in_batch": torch.tensor(float(sum(lengths)))}


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5))
def test_label_rows_are_the_positions_before_labelled_tokens(documents: list[list[bool]]) -> None:
    """Catches rows that are off by one, or that let a document's last token predict the next document's first."""
    rows = [
        {"input_ids": [7] * len(mask), "labels": [10 * d + i if kept else IGNORED for i, kept in enumerate(mask)]}
        for d, mask in enumerate(documents)
    ]
    batch = PaddingFree(pad_token_id=0, padding_free=True)(rows)
    expected, start = [], 0
    for d, mask in enumerate(documents):
        expected += [(start + i - 1, 10 * d + i) for i, kept in enumerate(mask) if kept and i]
        start += len(mask)
    assert list(map(tuple, batch["label_rows"].T.tolist())) == expected


def test_only_a_batch_that_is_nearly_whole_is_filled_up() -> None:
    filled, half, over = batch_of([90, 100], whole=200), batch_of([50, 50], whole=200), batch_of([120, 120], whole=200)
    assert filled["input_ids"].shape == filled["labels"].shape == filled["position_ids"].shape == (1, 200)
    assert filled["fill"] == 10
    assert filled["cu_seq_lens_q"].tolist() == [0, 90, 190, 200]
    assert (filled["labels"][0, 190:] == IGNORED).all()
    assert filled["max_length_q"] == 100
    for other, tokens in ((half, 100), (over, 240)):
        assert "fill" not in other
        assert other["input_ids"].shape == (1, tokens)


def measured(trainer: Any, batch: Batch) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of one pass."""
    batch = dict(batch)
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.training_step(trainer.model, batch, batch.pop("num_items_in_batch"))
    metrics = {name: float(values[-1]) for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    return loss, metrics, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture
def trainer(make: Callable[..., Any]) -> Any:
    trainer = make()
    trainer.create_optimizer()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradients
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return trainer


def same(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_filling_a_batch_changes_no_loss_and_no_gradient(trainer: Any) -> None:
    """Catches fill that is seen by real tokens, carries a label, or is counted as trained on."""
    plain = measured(trainer, batch_of([90, 101]))
    seen = trainer._total_train_tokens
    same(measured(trainer, batch_of([90, 101], whole=200)), plain)
    assert trainer._total_train_tokens == 2 * seen == 2 * 191


@pytest.mark.parametrize("labelled", [1.0, 0.4])
@pytest.mark.parametrize("lengths", [[64, 64, 64], [3, 90, 1, 40]])
def test_room_for_more_changes_no_loss_and_no_gradient(trainer: Any, lengths: list[int], labelled: float) -> None:
    """Catches spare rows that reach the loss or write over a real gradient, and empty documents that shift others."""
    batch = batch_of(lengths, labelled=labelled)
    form = Form.of(batch)
    laid_out = form.laid_out(batch)
    assert laid_out["label_rows"].shape[1] > batch["label_rows"].shape[1]
    assert (laid_out["cu_seq_lens_q"].numel() > len(lengths) + 1) == (len(set(lengths)) > 1)
    same(measured(trainer, laid_out), measured(trainer, batch))


def test_a_form_holds_what_fits_its_room_and_nothing_else() -> None:
    form = Form.of(batch_of([100, 50, 42]))
    assert form.holds(batch_of([100, 50, 42]))
    assert form.holds(batch_of([42, 100, 25, 25]))
    assert form.holds(batch_of([128, 64]))
    assert not form.holds(batch_of([129, 63])), "longer than there is room for"
    assert not form.holds(batch_of([1] * DOCUMENTS + [128])), "more documents"
    assert not form.holds(batch_of([100, 50, 43])), "more tokens"
    assert not form.holds(batch_of([96, 96])), "documents of one length take another kernel"
    assert not form.holds(batch_of([100, 50, 42], labelled=0.05)), "so few labels that spare rows would be most"
    rows = Form.of(batch_of([96, 96]))
    assert rows.holds(batch_of([96, 96]))
    assert not rows.holds(batch_of([64, 64, 64]))
    assert not rows.holds(batch_of([100, 92]))
    assert not replace(form, label_rows=150).holds(batch_of([100, 50, 42]))


def test_room_for_documents_is_not_taken_for_rows() -> None:
    """64 documents of at most 3 tokens in 192: with so much room the kernel for rows of one length would be taken."""
    batch = batch_of([3] * 62 + [2, 4])
    laid_out = Form.of(batch).laid_out(batch)
    assert (laid_out["cu_seq_lens_q"].numel() - 1) * laid_out["max_length_q"] != laid_out["input_ids"].numel()


def test_what_a_graph_would_not_see_is_found(load: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """Catches hooks that would silently stop being called, and layers whose path nobody has tried."""
    model, _ = load("16bit")
    assert obstacle(model) is None
    model.enable_input_require_grads()  # transformers' own hook
    assert obstacle(model) is None
    seen: list[Any] = []
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *args: seen.append(args))
    assert "hooks on" in str(obstacle(model))
    assert "lm_head" in str(obstacle(model))
    handle.remove()
    assert obstacle(model) is None
    model.get_base_model().model.rotary_emb.rope_type = "dynamic"
    assert "rotary" in str(obstacle(model))
    model.get_base_model().model.rotary_emb.rope_type = "default"
    with torch.autograd.set_detect_anomaly(True):
        assert "anomaly" in str(obstacle(model))
    with caplog.at_level(logging.WARNING):
        dropped = whet.FastLanguageModel.get_peft_model(load("16bit")[0].unload(), r=4, lora_dropout=0.1).train()
        assert "LoRA dropout" in str(obstacle(dropped))


def test_what_changes_between_passes_is_not_replayed(trainer: Any) -> None:
    """A callback freezes a weight: catches a graph that goes on adding to its gradient, which the optimizer applies."""
    passes = PassGraph(trainer.model, lambda batch: {"loss": torch.tensor(0.0)}, allowed=False)
    seen = []

    def run(change: Callable[[], object] = lambda: None) -> None:
        change()
        passes(batch_of([20, 30]))
        seen.append(passes._passes)

    frozen = next(p for p in trainer.model.parameters() if p.requires_grad)
    run()
    run()
    run(lambda: frozen.requires_grad_(False))
    run()
    run(lambda: setattr(passes.shared, "tile", 16))
    assert seen == [1, 2, 1, 2, 1]
