"""Batches without padding: rows one after another, with what a GPU would otherwise be waited for, found on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from whet.models.head import IGNORED

LEAST_FILLED = 0.95  # of a whole pass: with less in it the fill would cost more than the steady shape saves

Batch = dict[str, Any]


@dataclass
class PaddingFree(DataCollatorForLanguageModeling):
    """TRL's padding-free collator, whose batches [1, T] also say where documents begin and which tokens are predicted.

    label_rows [2, N]: the positions whose next token has a label, and those labels.
    whole: tokens of a whole pass, or 0. A batch that nearly has them is filled up with one more document, which has no
    labels: batches of one shape run as one CUDA graph (train/pass_graph.py). `fill` says how many tokens that were.
    """

    whole: int = 0

    def torch_call(self, examples: list[Batch]) -> Batch:
        batch = super().torch_call(examples)
        missing = self.whole - batch["input_ids"].shape[1]
        if 0 < missing <= (1 - LEAST_FILLED) * self.whole:
            batch = self._filled(batch, missing)
        if "cu_seq_lens_q" not in batch or "fill" in batch:  # TRL has it from 1.16 on
            positions = batch["position_ids"][0]
            bounds = torch.cat([(positions == 0).nonzero().flatten(), torch.tensor([len(positions)])]).to(torch.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = bounds
            batch["max_length_q"] = batch["max_length_k"] = int(bounds.diff().max())
        batch["label_rows"] = label_rows(batch["labels"])
        return batch

    def _filled(self, batch: Batch, missing: int) -> Batch:
        fills = {
            "input_ids": torch.full((1, missing), self.pad_token_id),
            "labels": torch.full((1, missing), IGNORED),
            "position_ids": torch.arange(missing)[None],
        }
        if "seq_idx" in batch:
            fills["seq_idx"] = batch["seq_idx"].new_full((1, missing), int(batch["seq_idx"][0, -1]) + 1)
        return {
            **batch,
            **{name: torch.cat([batch[name], fill], dim=1) for name, fill in fills.items()},
            "fill": missing,
        }


def nearly_whole(rows: Any, length: int, sample: int = 64) -> bool:
    """Whether rows of token ids have `length` tokens, but for what a fill makes up: judged by some of them.

    False for rows that are not tokenized, or can't be looked at without being used up.
    """
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or not len(rows):
        return False
    picked = [rows[i] for i in range(0, len(rows), max(1, len(rows) // sample))]
    if not all("input_ids" in row for row in picked):
        return False
    return sum(min(len(row["input_ids"]), length) for row in picked) >= LEAST_FILLED * length * len(picked)


def label_rows(labels: Tensor) -> Tensor:
    """[2, N] of labels [1, T]: the positions whose next token has a label, and those labels."""
    following = labels[0, 1:]
    rows = (following != IGNORED).nonzero().flatten()
    return torch.stack([rows, following[rows]])
