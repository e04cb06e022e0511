"""A recipe's data, made ready: training rows, held-out rows as token ids, and held-out questions to generate for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from whet.data import template
from whet.data.examples import Conversation, Example, Preference
from whet.data.pack import fill_fraction, pack
from whet.errors import WhetError
from whet.files import write_text


@dataclass(frozen=True)
class Question:
    """prompt: text as the model sees it, generation prompt included. reference: the answer that the row holds."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class Prepared:
    """train: packed or single rows for sft, pairs for dpo. heldout: input_ids and labels. summary: counts to show."""

    train: Dataset
    heldout: Dataset
    questions: list[Question]
    summary: dict[str, Any]

    def save(self, folder: Path) -> None:
        self.train.save_to_disk(str(folder / "train"))
        self.heldout.save_to_disk(str(folder / "heldout"))
        lines = [json.dumps(asdict(question)) + "\n" for question in self.questions]
        write_text(folder / "questions.jsonl", "".join(lines))


def prepare(
    train: Sequence[Example],
    heldout: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str,
    max_length: int,
    train_on: template.TrainOn,
    packing: bool,
) -> Prepared:
    """Raises WhetError when the examples do not fit the method or nothing is left to learn from."""
    summary: dict[str, Any] = {}
    if method == "dpo":
        rows = _pairs(train)
        summary = {"pairs": len(rows)}
    else:
        rows, counts = template.prepare_sft(tokenizer, train, max_length=max_length, train_on=train_on)
        summary = {"rows": counts.rows, "tokens": counts.tokens, "label tokens": counts.label_tokens}
        summary |= {
            name: value for name, value in (("truncated", counts.truncated), ("all masked", counts.all_masked)) if value
        }
        if packing:
            rows = pack(rows, max_length)
            summary |= {"packed rows": len(rows), "full": f"{fill_fraction(rows, max_length):.1%}"}
    answers = [_chosen(example) for example in heldout]
    ids, counts = template.prepare_sft(tokenizer, answers, max_length=max_length, train_on=train_on)
    questions = [_question(tokenizer, example) for example in answers if isinstance(example, Conversation)]
    return Prepared(rows, ids, questions, summary | {"held out": counts.rows})


def read_questions(path: Path) -> list[Question]:
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _pairs(examples: Sequence[Example]) -> Dataset:
    for example in examples:
        if not isinstance(example, Preference):
            fix = "use rows with prompt, chosen and rejected, or train.method: sft"
            raise WhetError("dpo learns from preference pairs, and this row is none", where=example.where, fix=fix)
    return Dataset.from_list([example.content() for example in examples])


def _chosen(example: Example) -> Example:
    """A preference pair as the conversation it prefers; others unchanged."""
    if not isinstance(example, Preference):
        return example
    messages = [*example.prompt, *example.chosen]
    return Conversation(messages=messages, source=example.source, line=example.line)


def _question(tokenizer: PreTrainedTokenizerBase, example: Conversation) -> Question:
    answer = next(m["content"] for m in reversed(example.messages) if m["role"] == "assistant")
    return Question(template.prompt_text(tokenizer, example.messages, tools=example.tools), answer)
