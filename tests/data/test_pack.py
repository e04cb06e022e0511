"""Packing moves whole documents and loses none."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.pack import pack
from whet.errors import WhetError


def documents(lengths: list[int]) -> Dataset:
    """Documents whose tokens say which document and place they are from; every other one begins masked."""
    ids = [[1000 * i + k for k in range(length)] for i, length in enumerate(lengths)]
    labels = [[-100 if i % 2 and k == 0 else token for k, token in enumerate(row)] for i, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "other": ["x"] * len(ids)})


def fill_fraction(packed: Dataset, max_length: int) -> float:
    """The share of the rows' max_length tokens that hold documents, 0 to 1."""
    return sum(map(sum, packed["seq_lengths"])) / (len(packed) * max_length)


def unpacked(packed: Dataset) -> list[tuple[list[int], list[int]]]:
    found = []
    for row in packed:
        cuts = [0]
        for length in row["seq_lengths"]:
            cuts.append(cuts[-1] + length)
        assert cuts[-1] == len(row["input_ids"]) == len(row["labels"])
        found += [(row["input_ids"][a:b], row["labels"][a:b]) for a, b in pairwise(cuts)]
    return found


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=40))
def test_every_document_comes_back_whole_and_once(lengths: list[int]):
    dataset = documents(lengths)
    packed = pack(dataset, 32)
    assert sorted(unpacked(packed)) == sorted(zip(dataset["input_ids"], dataset["labels"], strict=True))
    assert max(map(len, packed["input_ids"])) <= 32
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert fill_fraction(packed, 32) == sum(lengths) / (32 * len(packed))


def test_rows_are_filled_and_the_same_each_time():
    """Mixed lengths: the fit must be good, and equal documents keep their order."""
    generator = random.Random(3)
    lengths = [min(512, int(generator.lognormvariate(4, 1)) + 1) for _ in range(1500)]
    packed = pack(documents(lengths), 512)
    assert fill_fraction(packed, 512) > 0.98
    assert pack(documents(lengths), 512)[:] == packed[:]


def test_equal_documents_keep_their_order():
    """Catches a sort that is not stable: the result would differ between machines."""
    packed = pack(documents([4] * 64), 16)
    assert [row[0] // 1000 for row, _ in unpacked(packed)] == list(range(64))


def test_the_collator_sees_the_boundaries():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = pack(documents([3, 5, 8]), 8)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(packed))
    assert batch["position_ids"][0].tolist() == [*range(8), *range(5), *range(3)]
    assert batch["cu_seq_lens_q"].tolist() == [0, 8, 13, 16]


def test_too_long_or_no_documents_are_refused():
    with pytest.raises(WhetError, match="a row of 9 tokens does not fit into 8"):
        pack(documents([3, 9]), 8)
    with pytest.raises(WhetError, match="no rows"):
        pack(documents([]), 8)


def test_documents_go_to_the_tightest_row_longest_first():
    """Catches cut documents, and first-fit, which would put the 1 beside the 13."""
    packed = pack(documents([1, 10, 13, 11]), 22)
    assert sorted(map(sorted, packed["seq_lengths"])) == [[1, 10, 11], [13]]
    assert fill_fraction(packed, 22) == 35 / 44


def test_a_document_of_the_full_length_fills_a_row():
    packed = pack(documents([8, 8]), 8)
    assert packed["seq_lengths"] == [[8], [8]]
    assert fill_fraction(packed, 8) == 1.0


def test_chat_like_lengths_leave_few_tokens_unused():
    """Half short questions, a third middling, some at the limit: rows of 2048 are at least 98% full."""
    generator = random.Random(11)
    kinds = [(20, 200)] * 5 + [(200, 900)] * 4 + [(2000, 2048)]
    lengths = [generator.randint(*generator.choice(kinds)) for _ in range(6000)]
    assert fill_fraction(pack(documents(lengths), 2048), 2048) >= 0.98
