"""What a scorer is: it looks at all answers of a task and says what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

from whet.evals.models import Prompt


class Options(BaseModel):
    """Of a scorer, as a task file gives them under `scorer`; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True)
class Question:
    """One item of a task.

    references: answers that count as right; none where the scorer needs none. choices: for log-likelihood.
    extra: the row's other columns, for scorers that read them. where: the file and line it came from.
    """

    id: str
    prompt: Prompt
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None

    @property
    def reference(self) -> str | None:
        """The first, which is shown."""
        return self.references[0] if self.references else None


class Score(NamedTuple):
    """value: 0 to 1; None where the answer could not be scored. note: why, or what else there is to say."""

    value: float | None
    note: str | None = None


class Scorer(Protocol):
    """Scores the answers of a task."""

    def check(self, question: Question) -> None:
        """Raises WhetError for a question that no answer could be scored to. Called before anything is generated."""

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Score]:
        """A score for each answer, in order."""

    def measures(self, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
        """What is computed over all answers at once, by name; usually nothing."""


class Each:
    """A scorer that looks at one answer at a time."""

    def check(self, question: Question) -> None:
        """Every question will do."""

    def one(self, question: Question, answer: str) -> Score:
        """The score of an answer."""
        raise NotImplementedError

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Score]:
        """A score for each answer, in order."""
        return [self.one(question, answer) for question, answer in zip(questions, answers, strict=True)]

    def measures(self, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Kind:
    """A kind of scorer: its options, and how one is made of them. Paths in the options start at the task's folder.

    needs_reference: a question without one is a fault of the task. columns: of a row, that the scorer reads besides.
    reads: names of the options that hold a file or folder, whose content decides scores as the options do.
    runs: the file that would run as code of the user's own, which has to be allowed. chooses: the model's answer is
    the likeliest of the choices, not what it generates.
    """

    options: type[BaseModel]
    build: Callable[[Any, Path], Scorer]
    needs_reference: bool = True
    columns: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    runs: Callable[[Any], str | None] = lambda options: None
    chooses: bool = False
