"""Packed rows, as SFTTrainer makes them, and the documents in them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset


def test_packed_documents_do_not_see_each_other(make: Callable[..., Any]) -> None:
    """Changes one document of a batch of packed rows: the logits of all others stay the same, to the bit."""
    trainer = make(packing=True, max_seq_length=64)
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    starts = batch["cu_seq_lens_q"].tolist()
    assert len(starts) > 3, "rows hold several documents"
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits[0]
        a, b = starts[1], starts[2]
        changed = batch["input_ids"].clone()
        changed[0, a:b] = (changed[0, a:b] + 7) % 500
        after = model(**{**inputs, "input_ids": changed}).logits[0]
    assert torch.equal(after[:a], before[:a])
    assert torch.equal(after[b:], before[b:])
    assert not torch.equal(after[a:b], before[a:b])
    assert "attention_mask" not in batch


def test_a_packed_document_has_the_logits_it_has_alone(make: Callable[..., Any]) -> None:
    trainer = make(packing=True, max_seq_length=64)
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    starts = batch["cu_seq_lens_q"].tolist()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs).logits[0]
        for a, b in pairwise(starts):
            torch.testing.assert_close(packed[a:b], model(batch["input_ids"][:, a:b]).logits[0], rtol=0, atol=1e-5)


def test_packing_few_short_rows_leaves_rows(make: Callable[..., Any]) -> None:
    trainer = make(dataset=Dataset.from_dict({"text": ["one", "two"]}), packing=True, max_seq_length=2048)
    assert len(trainer.train_dataset) == 1
    assert len(trainer.train_dataset[0]["seq_lengths"]) == 2
    trainer.train()
    assert trainer.state.global_step == 2


def test_packing_brings_no_false_warning(make: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """TRL 1.15 warns of documents that see each other, which they do not."""
    with caplog.at_level(logging.WARNING):
        make(packing=True)
        logging.getLogger("trl.trainer.sft_trainer").warning(
            "heard again after the constructor: supported Flash Attention variant"
        )
    assert caplog.text.count("Flash Attention") == 1
