"""Packed and padded rows: the same numbers as each document alone, and nothing that passes from one to another."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parity import harness
from tests.parity.families import WORDS, seeded

Checkpoint = Callable[..., Path]
LENGTHS = (9, 17, 1, 5, 14)  # longer than the window, shorter, and one token


@pytest.fixture(scope="session")
def trained(checkpoint: Checkpoint) -> Callable[[str], Any]:
    """trained(family) -> a whet model in fp32 whose adapter has an effect, the same object at every call."""

    @cache
    def model(family: str) -> Any:
        built = harness.whet_model(checkpoint(family), family, "fp32")
        harness.randomise_adapter(built)
        return built

    return model


def documents(lengths: tuple[int, ...] | list[int], seed: int = 5) -> list[torch.Tensor]:
    with seeded(seed):
        return [torch.randint(3, WORDS, (length,)) for length in lengths]


def summed(model: Any, batch: dict[str, torch.Tensor]) -> harness.Pass:
    """A pass whose loss is the sum over label tokens, so that passes over parts add up."""
    return harness.run(model, batch | {"num_items_in_batch": torch.tensor(1)})


def alone(model: Any, docs: list[torch.Tensor]) -> harness.Pass:
    """Each document in a pass of its own: losses and gradients added, logits one after another."""
    passes = [summed(model, harness.padded([document])) for document in docs if len(document) > 1]
    single = [harness.run(model, harness.padded([d])).logits if len(d) == 1 else None for d in docs]
    many = iter(passes)
    logits = torch.cat([next(many).logits if one is None else one for one in single])
    gradients = {name: sum(p.gradients[name] for p in passes) for name in passes[0].gradients}
    return harness.Pass(sum(p.loss for p in passes), logits, gradients)


def test_packed_documents_give_what_each_gives_alone(trained: Callable[[str], Any], family: str) -> None:
    """Catches attention or rope that runs on over a boundary, and a label that is taken from the next document."""
    docs = documents(LENGTHS)
    together = summed(trained(family), harness.packed(docs))
    worst = harness.differences(together, alone(trained(family), docs))
    assert worst.largest() <= 1e-5, worst


def test_boundaries_from_cu_seq_lens_equal_boundaries_from_positions(
    trained: Callable[[str], Any], family: str
) -> None:
    """Catches one of the two ways to say where documents start being read wrongly."""
    batch = harness.packed(documents(LENGTHS))
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 17, "max_length_k": 17}
    by_positions, by_offsets = (harness.run(trained(family), b) for b in (batch, batch | lengths))
    assert torch.equal(by_positions.logits, by_offsets.logits)
    assert all(torch.equal(by_positions.gradients[name], g) for name, g in by_offsets.gradients.items())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_each_gives_alone(trained: Callable[[str], Any], family: str, side: str) -> None:
    """Catches padding that is attended to, and rows of padding alone that turn gradients into not-a-number."""
    docs = documents([9, 17, 5, 14])
    together = summed(trained(family), harness.padded(docs, side))
    worst = harness.differences(together, alone(trained(family), docs))
    assert worst.largest() <= 1e-5, worst


def test_packed_rows_of_one_batch_have_their_own_boundaries(trained: Callable[[str], Any], family: str) -> None:
    """Catches the first row's boundaries being used for all rows."""
    rows = [harness.packed(documents(lengths, seed)) for lengths, seed in (((9, 17), 1), ((3, 12, 11), 2))]
    both = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    logits = torch.cat([harness.run(trained(family), row).logits for row in rows])
    assert harness.relative(harness.run(trained(family), both).logits, logits) <= 1e-5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 15), min_size=2, max_size=5), data=st.data())
def test_a_changed_document_leaves_the_others_bitwise_unchanged(
    trained: Callable[[str], Any], family: str, lengths: list[int], data: st.DataObject
) -> None:
    """Catches any leak between documents, however small: no tolerance."""
    changed = data.draw(st.integers(0, len(lengths) - 1), label="changed document")
    docs = documents(lengths)
    other = [(d - 2) % (WORDS - 3) + 3 if i == changed else d for i, d in enumerate(docs)]
    with torch.no_grad():
        before, after = (
            trained(family)(**harness.packed(d), use_cache=False).logits[0].split(lengths) for d in (docs, other)
        )
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) == (i != changed)
