"""A scorer that is a language model with a rubric: whet.evals.judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from whet.errors import WhetError
from whet.evals.judge.grading import Case, Grading, Judge
from whet.evals.judge.settings import JudgeSettings
from whet.evals.scorers.base import Each, Kind, Question, Score


@dataclass
class Judged(Each):
    """The judge's score; None where it gave too few verdicts, with a note that says why.

    last: of the answers that were scored last.
    """

    settings: JudgeSettings
    judge: Judge
    last: Grading | None = field(default=None, init=False, repr=False)

    def check(self, question: Question) -> None:
        if self.settings.reference == "required" and not question.references:
            fix = "add a reference, or let the judge do without: reference: optional"
            raise WhetError("there is no reference for the judge to see", fix=fix)

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> list[Score]:
        """All answers go to the judge together."""
        cases = [
            Case(question.id, question.prompt.shown, answer, "\n\nor\n\n".join(question.references) or None)
            for question, answer in zip(questions, answers, strict=True)
        ]
        self.last = self.judge.grade(cases)
        return [Score(graded.score, graded.note or None) for graded in self.last.graded]

    def measures(self, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
        """Of what was scored last: the judge's failures by kind, its repeats' agreement, and the tokens it took."""
        if self.last is None:
            return {}
        found = {f"judge_{kind}": float(count) for kind, count in sorted(self.last.failures.items())}
        for criterion in self.settings.criteria:
            if (alpha := self.last.repeatability(criterion.name)) is not None:
                found[f"repeats_alpha_{criterion.name}"] = alpha.estimate
        if (usage := self.last.usage) is not None:
            found["judge_prompt_tokens"] = float(usage.prompt_tokens)
            found["judge_completion_tokens"] = float(usage.completion_tokens)
        return found


JUDGE = Kind(JudgeSettings, lambda settings, folder: Judged(settings, Judge(settings, folder)), needs_reference=False)
