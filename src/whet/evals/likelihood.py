"""How likely a model finds texts that go on from a prompt: one pass without a cache, padded at the right.

    log p(continuation | context) = sum_t log softmax(logits_t)[token_t],   nats

Rows that differ in their last token alone, such as single-token choices, are read off one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**27
"""Logits held at a time, in numbers: half a GiB in fp32."""


@dataclass(frozen=True)
class Continuation:
    """Token ids of what is given, at least one, and of what goes on from it, at least one."""

    context: list[int]
    tokens: list[int]

    @property
    def read(self) -> tuple[int, ...]:
        """What the model has to read: all but the last token."""
        return (*self.context, *self.tokens[:-1])


@torch.no_grad()
def log_probs(model: Any, continuations: Sequence[Continuation]) -> list[float]:
    """log p(tokens | context) of each, in nats. Leaves evaluation mode to the caller."""
    found = [0.0] * len(continuations)
    for batch in _batches(continuations, model.config.get_text_config().vocab_size):
        first = min(len(continuations[i].context) for members in batch.values() for i in members) - 1
        logits_BTV = _logits(model, list(batch), first)
        for row_TV, members in zip(logits_BTV, batch.values(), strict=True):
            for i in members:
                start, tokens = len(continuations[i].context) - 1 - first, continuations[i].tokens
                own_TV = row_TV[start : start + len(tokens)].float().log_softmax(-1)
                labels = torch.tensor(tokens, device=own_TV.device)
                found[i] = own_TV.gather(1, labels[:, None]).sum(dtype=torch.float64).item()
    return found


Batch = dict[tuple[int, ...], list[int]]
"""What is read -> the numbers of the continuations that it decides."""


def _batches(continuations: Sequence[Continuation], vocabulary: int) -> Iterator[Batch]:
    """Rows by rising length, as many together as their logits allow."""
    rows: Batch = {}
    for i, continuation in enumerate(continuations):
        rows.setdefault(continuation.read, []).append(i)
    batch: Batch = {}
    first = 0
    for read in sorted(rows, key=len):
        own = min(len(continuations[i].context) for i in rows[read]) - 1
        first = min(first, own) if batch else own
        if batch and (len(batch) + 1) * (len(read) - first) * vocabulary > LOGITS_AT_ONCE:
            yield batch
            batch, first = {}, own
        batch[read] = rows[read]
    if batch:
        yield batch


def _logits(model: Any, rows: Sequence[Sequence[int]], first: int) -> Tensor:
    """Logits [B, T, V] from the position `first` on."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=width - first)
    logits: Tensor = out.logits
    return logits
