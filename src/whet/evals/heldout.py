"""How well a model does on held-out rows: the loss of the reference answers, and how many answers it gets exactly.

loss          mean negative log-likelihood a label token, nats
exact match   share of rows whose greedy answer equals the reference, white space at the ends apart
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from whet.data.prepare import Question
from whet.evals import generation
from whet.evals.generation import Generation
from whet.evals.likelihood import LOGITS_AT_ONCE
from whet.evals.undisturbed import undisturbed
from whet.files import write_text

Model: TypeAlias = Any
"""A transformers model, or one in a PeftModel: torch types their attributes as tensors, so no stricter type holds."""

Rows: TypeAlias = Sequence[dict[str, list[int]]]
"""Each with input_ids and labels [T]: a list, or a datasets.Dataset whose rows stay on the disk."""


@dataclass(frozen=True)
class Comparison:
    """The base and the tuned model on the same held-out rows."""

    questions: Sequence[Question]
    scores: dict[str, dict[str, float]]
    answers: dict[str, list[str]]
    rows: int

    @property
    def summary(self) -> dict[str, Any]:
        """Each measure as "base -> tuned", and what it was measured on."""
        base, tuned = self.scores["base"], self.scores["tuned"]
        shown = {measure: f"{base[measure]:.4g} -> {tuned[measure]:.4g}" for measure in base}
        return shown | {"rows": self.rows} | ({"questions": len(self.questions)} if self.questions else {})

    def save(self, path: Path) -> None:
        """One JSON line a question: prompt, reference and both answers."""
        lines = (
            {"prompt": question.prompt, "reference": question.reference, "base": base, "tuned": tuned}
            for question, base, tuned in zip(self.questions, self.answers["base"], self.answers["tuned"], strict=True)
        )
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def compare(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    questions: Sequence[Question],
    *,
    base: Callable[[], Model] | None,
    max_new_tokens: int,
    batch: int,
    console: Console,
) -> Comparison:
    """Score `model`, then its base: the model `base` loads, or where that is None the model with its adapter off."""
    scores, answers = {}, {}

    def score(name: str, chosen: Model) -> None:
        scores[name] = {"loss": mean_loss(chosen, rows)}
        prompts = [question.prompt for question in questions]
        shown = console.status(f"{name}: answering {len(questions)} held-out questions")
        with shown if console.is_terminal else nullcontext():
            answers[name] = generate(chosen, tokenizer, prompts, max_new_tokens=max_new_tokens, batch=batch)
        if questions:
            scores[name]["exact match"] = exact_match(answers[name], [question.reference for question in questions])

    score("tuned", model)
    if base is None:
        with model.disable_adapter():
            score("base", model)
    else:
        score("base", base())
    return Comparison(questions, scores, answers, len(rows))


def mean_loss(model: Model, rows: Rows) -> float:
    """Mean loss over the label tokens of `rows`, each with input_ids and labels (-100 carries no loss) [T]."""
    with undisturbed(model):
        return _mean_loss(model, rows)


def _mean_loss(model: Model, rows: Rows) -> float:
    total, count = 0.0, 0
    for batch in _batches(rows, model.config.get_text_config().vocab_size):
        width = max(len(row["input_ids"]) for row in batch)
        ids, labels, mask = (torch.full((len(batch), width), fill, device=model.device) for fill in (0, -100, 0))
        for i, row in enumerate(batch):
            length = len(row["input_ids"])
            ids[i, :length] = torch.tensor(row["input_ids"])
            labels[i, :length] = torch.tensor(row["labels"])
            mask[i, :length] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        total += losses.double().item()
        count += int((labels[:, 1:] != -100).sum())
    return total / count


def _batches(rows: Rows, vocabulary: int) -> Iterable[list[dict[str, list[int]]]]:
    """Rows by rising length, as many together as their logits allow."""
    lengths = [len(row["input_ids"]) for row in rows]
    batch: list[dict[str, list[int]]] = []
    for row in (rows[i] for i in sorted(range(len(rows)), key=lengths.__getitem__)):
        if batch and (len(batch) + 1) * len(row["input_ids"]) * vocabulary > LOGITS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch: int = 16,
) -> list[str]:
    """The greedy answer to each prompt (rendered text), without special tokens, white space at the ends cut."""
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    with undisturbed(model):
        return generation.generate(model, tokenizer, ids, Generation(max_new_tokens), batch=batch)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference, white space at the ends apart."""
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True)) / len(references)
