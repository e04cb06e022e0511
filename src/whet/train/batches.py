"""The batches of the step at hand, kept so that a step that went wrong can say which rows it was made of.

`StepBatches` goes before a trainer's class. It keeps references only: no copy is made, and nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from whet.models.head import IGNORED
from whet.train.trainers import DPOTrainer, SFTTrainer

Batch = dict[str, Any]
Place = tuple[int, int]
"""A micro-batch: the optimizer step it is for, counted from 1, and its number within the step, from 0."""

SEARCHED = 200_000
"""Rows among which those of a batch are looked for."""


class StepBatches:
    """A trainer that knows the micro-batches of its last step, and passes over the ones in `skipped`.

    The order of the rows is the same each time a step is repeated, so a place names the same batch again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_batches: list[Batch] = []
        self.skipped: frozenset[Place] = frozenset()
        self._begun = -1

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Any:
        done = self.state.global_step  # type: ignore[attr-defined]
        if done != self._begun:
            self.step_batches, self._begun = [], done
        self.step_batches.append(inputs)
        if (done + 1, len(self.step_batches) - 1) in self.skipped:
            return torch.zeros((), device=self.args.device)  # type: ignore[attr-defined]
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]


class WatchedSFTTrainer(StepBatches, SFTTrainer):
    """SFTTrainer with `step_batches` and `skipped`."""


class WatchedDPOTrainer(StepBatches, DPOTrainer):
    """DPOTrainer with `step_batches` and `skipped`."""


def rows_of(batch: Batch, dataset: Any) -> list[int]:
    """The numbers of the data set's rows that a batch was made of, in its order; those that are not found are left out.

    batch: input_ids [1, T], rows one after another, or [B, T], padded at the right; or anything else: no rows.
    """
    ids = batch.get("input_ids")
    columns = getattr(dataset, "column_names", None) or []
    if not isinstance(ids, torch.Tensor) or "input_ids" not in columns:
        return []
    begins: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    looked_at = dataset.select(range(min(len(dataset), SEARCHED)))
    wanted = {tuple(row[i : i + 4]) for row in ids.tolist() for i in range(len(row))}
    for number, row in enumerate(looked_at["input_ids"]):
        if tuple(row[:4]) in wanted:
            begins.setdefault(tuple(row[:4]), []).append((number, list(row)))
    return [number for line in ids.tolist() for number in _walk(line, begins)]


def _walk(line: Sequence[int], begins: dict[tuple[int, ...], list[tuple[int, list[int]]]]) -> Iterator[int]:
    """The rows that stand in `line` one after another, up to where none begins."""
    place = 0
    while place < len(line):
        known = begins.get(tuple(line[place : place + 4]), [])
        fitting = [(number, row) for number, row in known if list(line[place : place + len(row)]) == row]
        if not fitting:
            return
        number, row = max(fitting, key=lambda found: len(found[1]))
        yield number
        place += len(row)


def labelled(batch: Batch) -> bool | None:
    """Whether any token of a batch is learned; None where it can't be told. Waits for the GPU."""
    labels = batch.get("labels")
    return bool((labels[..., 1:] != IGNORED).any()) if isinstance(labels, torch.Tensor) else None
