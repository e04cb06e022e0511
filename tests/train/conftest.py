"""Models and trainers on the tiny Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import whet
from tests.train.setups import TEXTS, common


@pytest.fixture
def load(tiny_llama: Path) -> Callable[..., Any]:
    """load(...) -> (model with an adapter, tokenizer), of random weights that are the same each time."""

    def load(precision: str = "4bit", checkpointing: bool | str = False, longest: int = 64, **options: Any) -> Any:
        model, tokenizer = whet.FastLanguageModel.from_pretrained(
            str(tiny_llama),
            max_seq_length=longest,
            load_in_4bit=precision == "4bit",
            use_gradient_checkpointing=checkpointing,
            **options,
        )
        model = whet.FastLanguageModel.get_peft_model(
            model,
            r=16,
            use_gradient_checkpointing=checkpointing,
            target_modules=["q_proj", "v_proj", "down_proj"],
            task_type="SEQ_CLS" if options.get("num_labels") else "CAUSAL_LM",
        )
        return model, tokenizer

    return load


@pytest.fixture
def make(load: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """make(trainer arguments) -> an SFTTrainer that has not trained yet."""

    def make(checkpointing: bool | str = False, dataset: Dataset | None = None, **arguments: Any) -> Any:
        model, tokenizer = load("16bit", checkpointing)
        arguments.setdefault("args", whet.TrainingArguments(**common(tmp_path)))
        train_dataset = dataset or Dataset.from_dict({"text": TEXTS})
        return whet.SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=train_dataset, **arguments)

    return make
