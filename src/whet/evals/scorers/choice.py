"""A scorer of multiple choice: the model's answer is the choice that it finds likeliest.

    argmax_c log p(c | prompt) / length(c)

As lm-evaluation-harness has it: `acc` with no length, `acc_norm` with the number of characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score


class ChoiceOptions(Options):
    normalize: Literal["none", "characters", "bytes"] = Field(
        "none", description="Divide a choice's log-likelihood by its length, so that long ones have a chance."
    )
    reference: Literal["text", "index", "letter"] = Field(
        "text", description="What the reference holds: the choice itself, its number from 0, or its letter from A."
    )


@dataclass(frozen=True)
class Choice(Each):
    """1 where the likeliest choice is one of the references."""

    options: ChoiceOptions

    def check(self, question: Question) -> None:
        if len(question.choices) < 2:
            fix = "give the task choices, or each row a column of them"
            raise WhetError(f"{len(question.choices)} choices where two are the least", fix=fix)
        if len(set(question.choices)) < len(question.choices):
            raise WhetError("two choices are the same", fix="remove one")
        if not all(question.choices):
            raise WhetError("a choice is empty", fix="fill it in, or remove it")
        self.right(question)

    def one(self, question: Question, answer: str) -> Score:
        return Score(float(answer in self.right(question)))

    def pick(self, question: Question, log_probs: Sequence[float]) -> tuple[str, str]:
        """The likeliest choice, the first of equals; and all their log-likelihoods, to show."""
        values = [p / self.length(c) for p, c in zip(log_probs, question.choices, strict=True)]
        best = max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
        shown = ", ".join(f"{c!r} {v:.4f}" for c, v in zip(question.choices, values, strict=True))
        return question.choices[best], shown

    def length(self, choice: str) -> int:
        if self.options.normalize == "none":
            return 1
        return len(choice) if self.options.normalize == "characters" else len(choice.encode())

    def right(self, question: Question) -> list[str]:
        """The choices that the references name."""
        return [self._named(reference, question.choices) for reference in question.references]

    def _named(self, reference: str, choices: Sequence[str]) -> str:
        reference = reference.strip()
        if self.options.reference == "text":
            found = [choice for choice in choices if choice.strip() == reference]
        else:
            number = _index(reference) if self.options.reference == "index" else _letter(reference)
            found = [choices[number]] if number is not None and number < len(choices) else []
        if not found:
            fix = f"use one of {', '.join(choices)}, or say what the reference holds, as: reference: index"
            raise WhetError(f"the reference {reference!r} is none of the choices", fix=fix)
        return found[0]


def _index(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _letter(text: str) -> int | None:
    return ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() and text.isalpha() else None


CHOICE = Kind(ChoiceOptions, lambda options, folder: Choice(options), chooses=True)
