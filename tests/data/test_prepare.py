"""A version made ready: rows with labels, questions with their references."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from tests.road import CONVERSATIONS, write_rows
from whet.data.formats import Source, load_examples
from whet.data.prepare import Prepared, prepare, read_questions
from whet.data.split import split
from whet.errors import WhetError
from whet.models.load import load_tokenizer

PAIRS = [{"prompt": f"Number {i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny")


def sides(folder: Path, rows: list[dict[str, Any]]) -> Any:
    write_rows(folder / "rows.jsonl", rows)
    return split(load_examples([Source("rows.jsonl")], base=folder), 0.25, seed=1)


def prepared(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Prepared:
    options = {"method": "sft", "max_length": 64, "train_on": "responses", "packing": True, **options}
    return prepare(*sides(folder, rows), tokenizer, **options)


def test_only_answers_carry_labels(tmp_path: Path, tokenizer: Any) -> None:
    made = prepared(tmp_path, tokenizer, CONVERSATIONS, packing=False)
    for row in made.heldout:
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learned.removesuffix(tokenizer.eos_token).strip() in ("red", "green", "blue")
        assert "Which colour" in tokenizer.decode(row["input_ids"])


def test_questions_end_where_the_answer_begins(tmp_path: Path, tokenizer: Any) -> None:
    """Catches a reference inside its own question, and a prompt that training never saw."""
    made = prepared(tmp_path, tokenizer, CONVERSATIONS)
    assert len(made.questions) == len(made.heldout)
    for question, row in zip(made.questions, made.heldout, strict=True):
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith(question.prompt)
        assert text[len(question.prompt) :].startswith(question.reference)


def test_packing_loses_no_token(tmp_path: Path, tokenizer: Any) -> None:
    packed, single = (prepared(tmp_path, tokenizer, CONVERSATIONS, packing=p).train for p in (True, False))
    assert len(packed) < len(single)
    assert sorted(chain.from_iterable(packed["input_ids"])) == sorted(chain.from_iterable(single["input_ids"]))
    assert sum(map(sum, packed["seq_lengths"])) == sum(map(len, single["input_ids"]))


def test_pairs_are_kept_and_their_better_answers_evaluated(tmp_path: Path, tokenizer: Any) -> None:
    made = prepared(tmp_path, tokenizer, PAIRS, method="dpo")
    assert set(made.train.column_names) == {"prompt", "chosen", "rejected"}
    assert made.train[0]["chosen"][0]["content"].startswith("yes")
    assert all(question.reference.startswith("yes") for question in made.questions)


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "red"}
    long = [[{"role": "user", "content": f"{i} " * 100}, answer] for i in range(12)]
    rows = [*CONVERSATIONS, *({"messages": messages} for messages in long)]
    made = prepared(tmp_path, tokenizer, rows)
    assert made.summary["all masked"] > 0
    assert made.summary["rows"] + made.summary["all masked"] == len(sides(tmp_path, rows)[0])


def test_sft_refuses_pairs_by_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(WhetError, match=r"rows\.jsonl:\d+"):
        prepared(tmp_path, tokenizer, PAIRS)


def test_dpo_refuses_conversations_by_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(WhetError, match=r"rows\.jsonl:\d+: dpo learns from preference pairs"):
        prepared(tmp_path, tokenizer, CONVERSATIONS, method="dpo")


def test_what_is_saved_is_read_back(tmp_path: Path, tokenizer: Any) -> None:
    made = prepared(tmp_path, tokenizer, CONVERSATIONS)
    made.save(tmp_path / "data")
    assert read_questions(tmp_path / "data" / "questions.jsonl") == made.questions
    assert load_from_disk(str(tmp_path / "data" / "train")).to_list() == made.train.to_list()
    assert load_from_disk(str(tmp_path / "data" / "heldout")).to_list() == made.heldout.to_list()
