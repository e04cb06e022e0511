"""A score an answer: each criterion's grade, put together from the repeats and weighted into one number from 0 to 1.

    share(g) = (g - lowest) / (highest - lowest)
    score    = sum_c weight_c * share(grade_c) / sum_c weight_c

grade_c is the mean of the repeats' grades or, by majority, the grade that most repeats gave (the mean of those that lie
level). An answer has a score when more than half of its repeats gave a verdict; those that did not are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, multimode
from typing import Any

from whet.data.examples import Message
from whet.evals.agreement import krippendorff_alpha
from whet.evals.endpoint import Endpoint, Usage
from whet.evals.endpoint_http import Failure
from whet.evals.judge.asking import Verdict, ask
from whet.evals.judge.prompts import GRADE, conversation
from whet.evals.judge.settings import Criterion, JudgeSettings
from whet.evals.judge.verdicts import Mark, grades_form
from whet.evals.models import InMemory, Model
from whet.evals.statistics import Interval
from whet.models.load import load

Grades = Mapping[str, Mark]


@dataclass(frozen=True)
class Case:
    """What is judged: the question as a person reads it, and the answer to it."""

    id: str
    question: str
    answer: str
    reference: str | None = None


@dataclass(frozen=True)
class Graded:
    """What an answer is worth, 0 to 1. None: the judge gave too few verdicts, and `note` says why.

    verdicts: of each repeat, in order.
    """

    id: str
    score: float | None
    note: str
    verdicts: tuple[Verdict[Grades], ...]

    def grades(self, criterion: str) -> list[int | None]:
        """Of each repeat; None where it gave no verdict."""
        return [verdict.value[criterion].grade if verdict.value else None for verdict in self.verdicts]


@dataclass(frozen=True)
class Grading:
    """All answers' grades. usage: tokens that an endpoint says they cost; None for a local model."""

    graded: tuple[Graded, ...]
    criteria: tuple[Criterion, ...]
    usage: Usage | None

    @property
    def failures(self) -> Counter[str]:
        """Kind of failure -> repeats that ended in it. What was mended by asking again is not in it."""
        return failures_of([verdict for graded in self.graded for verdict in graded.verdicts])

    @property
    def unscored(self) -> int:
        return sum(graded.score is None for graded in self.graded)

    def repeatability(self, criterion: str, *, seed: int = 0) -> Interval | None:
        """Krippendorff's alpha (ordinal) of the repeats among themselves. None with one repeat or one grade alone."""
        units = [graded.grades(criterion) for graded in self.graded]
        return krippendorff_alpha(units, level="ordinal", seed=seed)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values: what was scored, what failed and how, how far repeats agree, what it cost."""
        repeats = {each.name: self.repeatability(each.name) for each in self.criteria}
        return {
            "answers": len(self.graded),
            "unscored": self.unscored,
            "failures": dict(self.failures),
            "repeats_alpha": {name: interval_json(found) for name, found in repeats.items()},
            "usage": usage_json(self.usage),
        }


class Judge:
    """A rubric and the model that grades by it."""

    def __init__(self, settings: JudgeSettings, folder: Path = Path(), model: Model | None = None):
        """folder: where a local model's relative path starts. model: in the place of the one that the settings name.

        Raises WhetError when an endpoint's key is not in the environment. A local model is read at the first question.
        """
        self.settings = settings
        self._folder = folder
        self._model = Endpoint(settings.endpoint) if model is None and settings.endpoint is not None else model

    @property
    def model(self) -> Model:
        if self._model is None:
            name = str(self.settings.model)
            beside = self._folder / name
            loaded, tokenizer = load(str(beside) if beside.is_dir() else name, precision=self.settings.load)
            self._model = InMemory(loaded, tokenizer, name=name)
        return self._model

    def usage(self) -> Usage | None:
        """Of all that was asked so far."""
        return self.model.usage if isinstance(self.model, Endpoint) else None

    def grade(self, cases: Sequence[Case], *, done: Callable[[int], None] = lambda count: None) -> Grading:
        """A score a case, in order. Raises WhetError when the judge cannot be asked at all.

        done: is told how many replies have come in a round; a repeat is a round, and so is each further try.
        """
        before = self.usage()
        form = grades_form(self.settings.criteria)
        conversations = [self._conversation(case, form.example) for case in cases]
        repeats = [
            ask(self.model, conversations, form, self.settings, seed=self.settings.seed + repeat, done=done)
            for repeat in range(self.settings.repeats)
        ]
        verdicts = [tuple(of_case) for of_case in zip(*repeats, strict=True)]
        graded = tuple(self._graded(case.id, own) for case, own in zip(cases, verdicts, strict=True))
        return Grading(graded, tuple(self.settings.criteria), spent(self.usage(), before))

    def shown_reference(self, case: Case) -> list[tuple[str, str]]:
        """The block of the reference, where the judge is to see one."""
        if case.reference is None or self.settings.reference == "never":
            return []
        return [("reference", case.reference)]

    def _conversation(self, case: Case, example: str) -> list[Message]:
        blocks = [("question", case.question), *self.shown_reference(case), ("answer", case.answer)]
        return conversation(self.settings, "grade.jinja", example, GRADE, blocks)

    def _graded(self, id_: str, verdicts: tuple[Verdict[Grades], ...]) -> Graded:
        values = [verdict.value for verdict in verdicts if verdict.value is not None]
        failed = failed_note([verdict.failure for verdict in verdicts if verdict.failure is not None], len(verdicts))
        if 2 * len(values) <= len(verdicts):
            return Graded(id_, None, failed, verdicts)
        grades = {each.name: self._combined([value[each.name].grade for value in values]) for each in self.criteria}
        reasons = [f"{each.name} {grades[each.name]:g}: {values[0][each.name].reason}" for each in self.criteria]
        return Graded(id_, self._score(grades), "; ".join([*reasons, *([failed] if failed else [])]), verdicts)

    @property
    def criteria(self) -> Sequence[Criterion]:
        return self.settings.criteria

    def _combined(self, grades: Sequence[int]) -> float:
        return fmean(multimode(grades) if self.settings.combine == "majority" else grades)

    def _score(self, grades: Mapping[str, float]) -> float:
        weights = [each.weight for each in self.criteria]
        return fmean([each.share(grades[each.name]) for each in self.criteria], weights)


def failed_note(failures: Sequence[Failure], repeats: int) -> str:
    """What became of the repeats without a verdict, in a line: each reason once."""
    if not failures:
        return ""
    reasons = dict.fromkeys(f"{failure.kind}: {failure.note}" for failure in failures)
    which = f"{len(failures)} of {repeats} repeats of the judge" if repeats > 1 else "the judge"
    return f"{which} gave no verdict ({'; '.join(reasons)})"


def failures_of(verdicts: Sequence[Verdict[Any]]) -> Counter[str]:
    """Kind -> verdicts that ended in it."""
    return Counter(verdict.failure.kind for verdict in verdicts if verdict.failure is not None)


def spent(after: Usage | None, before: Usage | None) -> Usage | None:
    return after - before if after is not None and before is not None else None


def interval_json(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    names = ("estimate", "low", "high", "confidence")
    return {name: getattr(interval, name) for name in names}


def usage_json(usage: Usage | None) -> dict[str, int] | None:
    return vars(usage).copy() if usage is not None else None
