"""Held-out measures against the plain computation, one row at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import whet
from whet.data.prepare import Question
from whet.evals import heldout
from whet.evals.heldout import compare, exact_match, generate, mean_loss

PROMPTS = [f"<|im_start|>user\n{'word ' * n}<|im_end|>\n<|im_start|>assistant\n" for n in (1, 9, 3, 20, 2)]


@pytest.fixture(scope="module")
def tuned() -> Any:
    model, tokenizer = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    model = whet.FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model, tokenizer


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    """Rows of unequal length, some tokens without loss."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (5, 17, 9, 2, 12):
        ids = torch.randint(10, 8000, (length,), generator=generator).tolist()
        masked = length // 2
        made.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return made


@pytest.mark.parametrize("at_once", [2**27, 1])
def test_mean_loss_is_the_mean_over_label_tokens(
    tuned: Any, rows: list[dict[str, list[int]]], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a mean of rows' means, padding that counts or is attended to, and batches that change the result."""
    monkeypatch.setattr(heldout, "LOGITS_AT_ONCE", at_once)
    model, _ = tuned
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for position in range(1, len(row["input_ids"])):
            if (label := row["labels"][position]) != -100:
                total -= logits[position - 1, label].item()
                count += 1
    assert mean_loss(model, rows) == pytest.approx(total / count, rel=1e-5)


def test_padded_batches_answer_as_single_prompts_do(tuned: Any) -> None:
    """Catches padding on the right, positions that count it, and answers in the order of the batches."""
    model, tokenizer = tuned
    single = [generate(model, tokenizer, [prompt], max_new_tokens=12, batch=1)[0] for prompt in PROMPTS]
    assert len(set(single)) > 1
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch=2) == single
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch=16) == single
    assert generate(model, tokenizer, [], max_new_tokens=12) == []


def test_exact_match() -> None:
    assert exact_match(["red", " blue\n", "Red", ""], ["red", "blue", "red", "green"]) == 0.5


@pytest.mark.parametrize("own_base", [True, False])
def test_compare_scores_the_base_without_the_adapter(
    tuned: Any, rows: list[dict[str, list[int]]], own_base: bool, tmp_path: Path
) -> None:
    """Catches a base that is scored with the adapter on, or scores that change places."""
    model, tokenizer = tuned
    base, _ = whet.FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    questions = [Question(prompt, "x") for prompt in PROMPTS[:2]]
    found = compare(
        model,
        tokenizer,
        rows,
        questions,
        base=(lambda: base) if own_base else None,
        max_new_tokens=3,
        batch=2,
        console=Console(quiet=True),
    )
    assert found.scores["base"]["loss"] == pytest.approx(mean_loss(base, rows), rel=1e-6)
    assert found.scores["tuned"]["loss"] == pytest.approx(mean_loss(model, rows), rel=1e-6)
    assert found.answers["base"] == generate(base, tokenizer, PROMPTS[:2], max_new_tokens=3)
    assert found.summary["rows"] == len(rows)
    found.save(tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["tuned"] for line in lines] == found.answers["tuned"]
