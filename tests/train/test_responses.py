"""Learning from answers alone, in a trainer's padded and packed rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset

import whet
from tests.train.setups import common
from whet.errors import WhetError
from whet.train.responses import find_markers, train_on_responses_only

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def conversation(*turns: tuple[str, str]) -> str:
    """Ends with the token that TRL would otherwise put there."""
    return SYSTEM + "\n".join(f"{USER}{q}<|im_end|>\n{ASSISTANT}{a}<|im_end|>" for q, a in turns)


ROWS = [conversation((f"What is {i}?", f"It is {i}."), ("Sure?", "Yes.")) for i in range(6)]
UNANSWERED = f"{SYSTEM}{USER}Is anybody there?<|im_end|>"


@pytest.fixture
def make(load: Callable[..., Any], tmp_path: Any) -> Callable[..., Any]:
    def make(texts: list[str], eval_dataset: Any = None, **arguments: Any) -> Any:
        model, tokenizer = load("16bit", longest=256)
        train_dataset = Dataset.from_dict({"text": texts})
        args = whet.SFTConfig(**common(tmp_path), **arguments)
        return whet.SFTTrainer(model, args, tokenizer=tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)

    return make


def learnt(trainer: Any, dataset: Dataset) -> list[str]:
    """What each row's labels say, prompts left out."""
    tokenizer = trainer.processing_class
    return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in dataset]


ANSWERS = [f"It is {i}.<|im_end|>Yes.<|im_end|>" for i in range(6)]


@pytest.mark.parametrize("markers", [(USER, ASSISTANT), (None, None), (USER, None)])
def test_only_answers_are_learnt(markers: tuple[str | None, str | None], make: Callable[..., Any]) -> None:
    """The token that ends an answer is one of them: without it a model never stops."""
    trainer = make(ROWS)
    assert train_on_responses_only(trainer, *markers) is trainer
    assert [text.replace("\n", "") for text in learnt(trainer, trainer.train_dataset)] == ANSWERS
    trainer.train()


def test_packed_rows_are_masked_document_by_document(make: Callable[..., Any]) -> None:
    """Catches the next document's system prompt being learnt as the end of an answer that stands before it."""
    trainer = make(ROWS, packing=True)
    packed = trainer.train_dataset
    assert max(len(row["seq_lengths"]) for row in packed) > 1
    train_on_responses_only(trainer, USER, ASSISTANT)
    assert trainer.train_dataset["seq_lengths"] == packed["seq_lengths"]
    assert trainer.train_dataset["input_ids"] == packed["input_ids"]
    text = "".join(learnt(trainer, trainer.train_dataset)).replace("\n", "")
    assert "Be brief" not in text
    assert sorted(text) == sorted("".join(ANSWERS))
    trainer.train()


def test_evaluation_rows_are_masked_too(make: Callable[..., Any]) -> None:
    held_out = Dataset.from_dict({"text": ROWS[:2]})
    trainer = train_on_responses_only(make(ROWS, held_out))
    assert [text.replace("\n", "") for text in learnt(trainer, trainer.eval_dataset)] == ANSWERS[:2]
    trainer = train_on_responses_only(make(ROWS, {"a": held_out, "b": held_out.select([1])}))
    assert [text.replace("\n", "") for text in learnt(trainer, trainer.eval_dataset["b"])] == ANSWERS[1:2]


def test_what_was_masked_before_stays_masked(make: Callable[..., Any]) -> None:
    trainer = make(ROWS)
    second_half = lambda row: {"labels": [-100] * 40 + row["input_ids"][40:]}  # noqa: E731
    trainer.train_dataset = trainer.train_dataset.map(second_half)
    train_on_responses_only(trainer)
    for row in trainer.train_dataset:
        assert set(row["labels"][:40]) == {-100}
        assert any(label != -100 for label in row["labels"])


def test_rows_without_an_answer_are_dropped_and_counted(
    make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make([*ROWS, UNANSWERED, UNANSWERED])
    with caplog.at_level(logging.WARNING, logger="whet"):
        train_on_responses_only(trainer)
    assert len(trainer.train_dataset) == len(ROWS)
    assert "dropped 2 of 8 rows" in caplog.text


def test_no_answer_anywhere_is_an_error_that_shows_markers_and_a_row(make: Callable[..., Any]) -> None:
    trainer = make(ROWS)
    rows = trainer.train_dataset
    with pytest.raises(WhetError) as raised:
        train_on_responses_only(trainer, "### Instruction:\n", "### Response:\n")
    assert "'### Instruction:\\n'" in str(raised.value)
    assert "'### Response:\\n'" in str(raised.value)
    assert "What is 0?" in str(raised.value)
    assert trainer.train_dataset is rows, "a failed call changes nothing"


def test_a_failure_in_the_evaluation_rows_leaves_the_training_rows(make: Callable[..., Any]) -> None:
    trainer = make(ROWS, Dataset.from_dict({"text": [UNANSWERED]}))
    rows = trainer.train_dataset
    with pytest.raises(WhetError, match="eval_dataset"):
        train_on_responses_only(trainer)
    assert trainer.train_dataset is rows


def test_a_streamed_data_set_is_refused(make: Callable[..., Any]) -> None:
    trainer = make(ROWS)
    trainer.train_dataset = IterableDataset.from_generator(lambda: iter([{"input_ids": [1]}]))
    with pytest.raises(WhetError, match="stream"):
        train_on_responses_only(trainer)


TEMPLATES = {
    "chatml": (None, USER, ASSISTANT),
    "gemma": (
        "{{bos_token}}{% for m in messages %}<start_of_turn>{{'model' if m.role == 'assistant' else m.role}}\n"
        "{{m.content}}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<start_of_turn>user\n",
        "<start_of_turn>model\n",
    ),
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{bos_token}}[INST] {{m.content}} [/INST]"
        "{% else %} {{m.content}} {{eos_token}}{% endif %}{% endfor %}",
        "[INST] ",
        "[/INST] ",
    ),
    "alpaca": (
        "Below is a task.\n\n{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{m.content}}\n\n"
        "{% else %}### Response:\n{{m.content}}{{eos_token}}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        "### Instruction:\n",
        "### Response:\n",
    ),
    "empty thought in the generation prompt": (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        USER,
        ASSISTANT,
    ),
    "another end after the last answer": (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}{{pad_token}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        USER,
        ASSISTANT,
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_markers_are_read_off_the_template(name: str, load: Callable[..., Any]) -> None:
    template, instruction, response = TEMPLATES[name]
    _, tokenizer = load("16bit")
    tokenizer.chat_template = template or tokenizer.chat_template
    found = find_markers(tokenizer)
    assert tuple(marker.strip() for marker in found) == (instruction.strip(), response.strip())


def test_a_template_that_rewrites_messages_asks_for_markers(load: Callable[..., Any]) -> None:
    _, tokenizer = load("16bit")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(WhetError, match="instruction_part="):
        find_markers(tokenizer)
