"""Formatting functions of today and of older scripts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from whet.errors import WhetError

QUESTIONS = Dataset.from_dict({"prompt": ["1+1", "2+2", "3+3"], "completion": ["2", "4", "6"], "messages": [[]] * 3})


def one(row: dict[str, Any]) -> str:
    return f"Q {row['prompt']} A {row['completion']}"


def one_in_a_list(row: dict[str, Any]) -> list[str]:
    return [f"Q {row['prompt'].strip()} A {row['completion']}"]


def batch_by_index(rows: dict[str, Any]) -> list[str]:
    return [f"Q {rows['prompt'][i]} A {rows['completion'][i]}" for i in range(len(rows["prompt"]))]


def batch_by_zip(rows: dict[str, Any]) -> list[str]:
    return [f"Q {q} A {a}" for q, a in zip(rows["prompt"], rows["completion"], strict=True)]


@pytest.mark.parametrize("function", [one, one_in_a_list, batch_by_index, batch_by_zip])
def test_formatting_functions_of_all_generations(function: Callable[..., Any], make: Callable[..., Any]) -> None:
    """Catches a function for batches being given one row, of which it makes a text for each letter; and other columns
    ("messages") being trained on in place of the text."""
    trainer = make(dataset=QUESTIONS, formatting_func=function, dataset_text_field="answer")
    texts = [trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert texts == [
        f"Q {q} A {a}<|im_end|>" for q, a in zip(QUESTIONS["prompt"], QUESTIONS["completion"], strict=True)
    ]
    assert trainer.train_dataset[0]["labels"] == trainer.train_dataset[0]["input_ids"]


def test_a_formatting_function_that_returns_no_text(make: Callable[..., Any]) -> None:
    with pytest.raises(WhetError, match="formatting_func"):
        make(dataset=QUESTIONS, formatting_func=lambda row: None)


def test_a_formatting_function_s_own_error_comes_through(make: Callable[..., Any]) -> None:
    with pytest.raises(KeyError, match="question"):
        make(dataset=QUESTIONS, formatting_func=lambda row: row["question"])
