"""How far a judge agrees with people: it grades answers that people have graded, from a file of rows.

    {"id": "q1", "prompt": "...", "answer": "...", "reference": "...", "labels": {"correct": [4, 5], "clear": 3}}

A criterion has one person's grade or a list, one a person; id and reference may be left out. The people's grade of an
answer is their lower median, the judge's that of its repeats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from whet.data.faults import Faults
from whet.data.read.rows import Row, read_rows
from whet.errors import WhetError
from whet.evals.agreement import cohen_kappa, krippendorff_alpha
from whet.evals.judge.grading import Case, Grading, Judge, interval_json
from whet.evals.judge.settings import Criterion
from whet.evals.statistics import Interval, proportion

EXAMPLE = '{"prompt": "...", "answer": "...", "labels": {"CRITERION": 4}}'


@dataclass(frozen=True)
class Labelled:
    """An answer and the people's grades of it, by criterion."""

    case: Case
    labels: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Agreement:
    """Of judge and people by one criterion.

    answers: that people graded; judged: of these, by the judge too, on which the rest is computed.
    exact: share of equal grades. near: share of grades at most one apart. kappa: Cohen's, quadratic weights.
    alpha: Krippendorff's (ordinal), the judge as one more person. people: the people's own, without the judge.
    None: it is not defined, as for one person alone, or where all grades are the same.
    """

    criterion: str
    answers: int
    judged: int
    exact: Interval | None
    near: Interval | None
    kappa: Interval | None
    alpha: Interval | None
    people: Interval | None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        measures = ("exact", "near", "kappa", "alpha", "people")
        counts = {"answers": self.answers, "judged": self.judged}
        return counts | {name: interval_json(getattr(self, name)) for name in measures}


def read_labelled(path: Path, criteria: Sequence[Criterion]) -> list[Labelled]:
    """The rows of a file of JSON lines, or of another kind that holds mappings. Raises WhetErrors that list faults."""
    faults = Faults()
    found = []
    for number, row in enumerate(read_rows(str(path), base=Path(), on_error=faults.add), start=1):
        try:
            found.append(_labelled(row, number, {each.name: each for each in criteria}))
        except WhetError as error:
            faults.add(error)
    faults.raise_if_any()
    if not found:
        raise WhetError("there are no labelled answers", where=str(path), fix=f"write rows as {EXAMPLE}")
    twice = [id_ for id_, count in Counter(labelled.case.id for labelled in found).items() if count > 1]
    if twice:
        raise WhetError(f"several rows have the id {twice[0]!r}", where=str(path), fix="give each its own")
    return found


def agreement_with_people(
    judge: Judge, labelled: Sequence[Labelled], *, done: Callable[[int], None] = lambda count: None
) -> tuple[dict[str, Agreement], Grading]:
    """The judge's agreement by each criterion that people graded, and its own grading of their answers."""
    grading = judge.grade([each.case for each in labelled], done=done)
    found = {}
    for criterion in judge.criteria:
        if any(criterion.name in each.labels for each in labelled):
            found[criterion.name] = _agreement(criterion.name, labelled, grading, judge.settings.seed)
    return found, grading


def _agreement(name: str, labelled: Sequence[Labelled], grading: Grading, seed: int) -> Agreement:
    people = [each.labels[name] for each in labelled if name in each.labels]
    judged = [
        median_low([grade for grade in graded.grades(name) if grade is not None]) if graded.score is not None else None
        for each, graded in zip(labelled, grading.graded, strict=True)
        if name in each.labels
    ]
    both = [(grade, median_low(own)) for grade, own in zip(judged, people, strict=True) if grade is not None]
    ratings = [[grade, *own] for grade, own in zip(judged, people, strict=True) if grade is not None]
    return Agreement(
        criterion=name,
        answers=len(people),
        judged=len(both),
        exact=proportion(sum(a == b for a, b in both), len(both)) if both else None,
        near=proportion(sum(abs(a - b) <= 1 for a, b in both), len(both)) if both else None,
        kappa=cohen_kappa(*zip(*both, strict=True), level="interval") if both else None,
        alpha=krippendorff_alpha(ratings, level="ordinal", seed=seed),
        people=krippendorff_alpha(people, level="ordinal", seed=seed),
    )


def _labelled(row: Row, number: int, criteria: Mapping[str, Criterion]) -> Labelled:
    values = row.values
    for name in ("prompt", "answer"):
        if not isinstance(values.get(name), str):
            raise WhetError(f"there is no text {name!r}", where=row.where, fix=f"write rows as {EXAMPLE}")
    reference, labels = values.get("reference"), values.get("labels")
    if reference is not None and not isinstance(reference, str):
        raise WhetError("the reference is no text", where=row.where, fix="write it in quotes, or leave it out")
    if not isinstance(labels, dict):
        raise WhetError("there are no labels", where=row.where, fix=f"write rows as {EXAMPLE}")
    labels = {name: grades for name, grades in labels.items() if grades is not None}
    if unknown := [name for name in labels if name not in criteria]:
        raise WhetError(f"no criterion is called {unknown[0]!r}", where=row.where, fix=f"use {', '.join(criteria)}")
    if not labels:
        raise WhetError("there are no labels", where=row.where, fix=f"write rows as {EXAMPLE}")
    case = Case(str(values.get("id", number)), values["prompt"], values["answer"], reference)
    return Labelled(case, {name: _grades(grades, criteria[name], row.where) for name, grades in labels.items()})


def _grades(grades: Any, criterion: Criterion, where: str) -> tuple[int, ...]:
    found = grades if isinstance(grades, list) else [grades]
    if not found or any(type(grade) is not int or grade not in criterion.grades for grade in found):
        fix = f"write whole numbers from {criterion.low} to {criterion.high}, one a person"
        raise WhetError(f"{grades!r} is no grade of {criterion.name!r}", where=where, fix=fix)
    return tuple(found)
