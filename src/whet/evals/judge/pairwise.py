"""Which of two answers is better, asked in both orders: judges lean to a place (Wang et al. 2023, arXiv:2305.17926).

    score of a      1 preferred, 1/2 tie, 0 not; the mean of both orders, so that a leaning to one place cancels out
    position bias   mean of (score of a where it stands first - score of a where it stands second), -1 to 1

A repeat counts when both of its orders have a verdict; a pair has a score when more than half of its repeats count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from whet.data.examples import Message
from whet.errors import WhetError
from whet.evals.endpoint import Usage
from whet.evals.judge.asking import Verdict, ask
from whet.evals.judge.grading import (
    Case,
    Judge,
    failed_note,
    failures_of,
    interval_json,
    spent,
    usage_json,
)
from whet.evals.judge.prompts import COMPARE, conversation
from whet.evals.judge.verdicts import Choice, Preference, preference_form
from whet.evals.results import TaskResult
from whet.evals.statistics import Interval, mean, paired_difference, proportion

WORTH: dict[Preference, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
"""Of the answer that stands first."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one question."""

    id: str
    question: str
    a: str
    b: str
    reference: str | None = None


@dataclass(frozen=True)
class Compared:
    """What `a` is worth against `b`. None: the judge gave too few verdicts, and `note` says why.

    a_first, b_first: the verdicts of each repeat, by which answer stood first.
    """

    id: str
    score: float | None
    note: str
    a_first: tuple[Verdict[Choice], ...]
    b_first: tuple[Verdict[Choice], ...]

    @property
    def both_orders(self) -> list[tuple[float, float]]:
        """(score of a as the first, score of a as the second) of each repeat that has both."""
        return [
            (WORTH[first.value.better], 1 - WORTH[second.value.better])
            for first, second in zip(self.a_first, self.b_first, strict=True)
            if first.value is not None and second.value is not None
        ]


@dataclass(frozen=True)
class Comparison:
    """`a` against `b` over all pairs, and how far the judge's verdicts hang on the order."""

    compared: tuple[Compared, ...]
    usage: Usage | None

    @property
    def failures(self) -> Counter[str]:
        """Kind of failure -> questions to the judge that ended in it, two a repeat."""
        return failures_of([verdict for pair in self.compared for verdict in (*pair.a_first, *pair.b_first)])

    @property
    def unscored(self) -> int:
        return sum(pair.score is None for pair in self.compared)

    @property
    def outcomes(self) -> Counter[str]:
        """ "a", "b", "tie": pairs by what their score says; "none": those without one."""
        return Counter(_outcome(pair.score) for pair in self.compared)

    def win_rate(self) -> Interval | None:
        """Mean score of `a` over the pairs that have one."""
        scores = [pair.score for pair in self.compared if pair.score is not None]
        return mean(scores) if scores else None

    def consistency(self) -> Interval | None:
        """Share of pairs of which every repeat says the same in both orders."""
        pairs = [pair.both_orders for pair in self.compared if pair.both_orders]
        if not pairs:
            return None
        return proportion(sum(all(first == second for first, second in orders) for orders in pairs), len(pairs))

    def position_bias(self) -> Interval | None:
        """What standing first is worth. Above 0 the judge leans to the first place, below 0 to the second."""
        pairs = [pair.both_orders for pair in self.compared if pair.both_orders]
        if not pairs:
            return None
        as_first = [fmean(first for first, _ in orders) for orders in pairs]
        as_second = [fmean(second for _, second in orders) for orders in pairs]
        return paired_difference(as_first, as_second)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "pairs": len(self.compared),
            "outcomes": dict(self.outcomes),
            "win_rate": interval_json(self.win_rate()),
            "consistency": interval_json(self.consistency()),
            "position_bias": interval_json(self.position_bias()),
            "unscored": self.unscored,
            "failures": dict(self.failures),
            "usage": usage_json(self.usage),
        }


def compare(judge: Judge, pairs: Sequence[Pair], *, done: Callable[[int], None] = lambda count: None) -> Comparison:
    """Each pair in both orders, `repeats` times. Raises WhetError when the judge cannot be asked at all."""
    before = judge.usage()
    a_first = _asked(judge, pairs, done, swapped=False)
    b_first = _asked(judge, pairs, done, swapped=True)
    compared = tuple(_compared(pair.id, *own) for pair, *own in zip(pairs, a_first, b_first, strict=True))
    return Comparison(compared, spent(judge.usage(), before))


def pairs_of(a: TaskResult, b: TaskResult) -> list[Pair]:
    """The answers of two models to one task, by the item's id. An answer that never came is an empty one.

    Raises WhetError when the results are not of the same questions.
    """
    others = {item.id: item for item in b.items}
    if a.digest != b.digest or {item.id for item in a.items} != others.keys():
        fix = "evaluate both models on the task as it is now"
        raise WhetError("the results are of different questions", where=f"{a.task}, {b.task}", fix=fix)
    return [Pair(item.id, item.prompt, item.answer, others[item.id].answer, item.reference) for item in a.items]


def _asked(
    judge: Judge, pairs: Sequence[Pair], done: Callable[[int], None], *, swapped: bool
) -> list[tuple[Verdict[Choice], ...]]:
    """The verdicts of a pair's repeats, in one order."""
    form, settings = preference_form(), judge.settings
    conversations = [_conversation(judge, pair, form.example, swapped=swapped) for pair in pairs]
    repeats = [
        ask(judge.model, conversations, form, settings, seed=settings.seed + repeat, done=done)
        for repeat in range(settings.repeats)
    ]
    return list(zip(*repeats, strict=True))


def _conversation(judge: Judge, pair: Pair, example: str, *, swapped: bool) -> list[Message]:
    first, second = (pair.b, pair.a) if swapped else (pair.a, pair.b)
    reference = judge.shown_reference(Case(pair.id, pair.question, "", pair.reference))
    blocks = [("question", pair.question), *reference, ("first answer", first), ("second answer", second)]
    return conversation(judge.settings, "compare.jinja", example, COMPARE, blocks)


def _compared(id_: str, a_first: tuple[Verdict[Choice], ...], b_first: tuple[Verdict[Choice], ...]) -> Compared:
    failed = failed_note([v.failure for v in (*a_first, *b_first) if v.failure is not None], 2 * len(a_first))
    compared = Compared(id_, None, failed, a_first, b_first)
    orders = compared.both_orders
    if 2 * len(orders) <= len(a_first):
        return compared
    reason = next(verdict.value.reason for verdict in a_first if verdict.value is not None)
    note = "; ".join(part for part in (reason, failed) if part)
    return Compared(id_, fmean(fmean(order) for order in orders), note, a_first, b_first)


def _outcome(score: float | None) -> str:
    if score is None:
        return "none"
    return "tie" if score == 0.5 else "a" if score > 0.5 else "b"
