"""The gate's checks, one function a kind. None raises for bad results: it says what is wrong and does not pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from whet.errors import WhetError
from whet.evals.gate_rules import Safety
from whet.evals.results import TaskResult
from whet.evals.statistics import Interval, detectable_gain, excess_p, paired_difference, proportion, ratio
from whet.evals.statistics.distributions import Floats, normal_quantile
from whet.evals.statistics.interval import is_binary

Results: TypeAlias = Mapping[str, TaskResult | WhetError]
"""By task; an error where results could not be read."""

POWER = 0.8
MOST = 1e12  # nats, or tokens, of one row: what is over it was not measured


@dataclass(frozen=True)
class Check:
    """One condition for shipping. what: a sentence with the numbers. numbers: the same for machines."""

    name: str
    passed: bool
    what: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found(Check):
    """A check, and whether it failed because there was nothing to compare."""

    unreadable: bool = False


@dataclass(frozen=True)
class TextLoss:
    """Loss of a model on general held-out text. losses: nats a row, summed over its tokens. tokens: how many each."""

    digest: str
    losses: tuple[float, ...]
    tokens: tuple[int, ...]


def compare_task(name: str, task: str, candidate: Results, reference: Results, limit: float, error: float) -> Found:
    """Whether the true difference candidate - reference on a task is over `limit`. error: of the interval, two-sided.

    An item that could not be scored counts against the candidate: as 0 among its own, as 1 among the reference's.
    """
    try:
        own, other = _readable(task, candidate, "the candidate"), _readable(task, reference, "what it is compared with")
        ours, theirs = _paired(own, other)
    except WhetError as problem:
        return Found(name, False, str(problem).replace("\n  fix:", ";"), unreadable=True)
    interval = paired_difference(ours, theirs, confidence=1 - error)
    p = excess_p(ours, theirs, limit)
    passed = interval.low > limit and p <= error / 2
    numbers = {
        "items": len(ours),
        "candidate": float(ours.mean()),
        "reference": float(theirs.mean()),
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "confidence": interval.confidence,
        "limit": limit,
        "p": p,
        "unscored": own.unscored,
        "reference_unscored": other.unscored,
    }
    what = f"{interval.points(signed=True)} points, {_must(limit)}"
    if not passed:
        what += f": {_why_not(ours, theirs, interval, limit, error)}"
    if own.unscored or other.unscored:
        what += f"; not scored, and counted against it: {own.unscored} of its items, {other.unscored} of the other's"
    return Found(name, passed, what, numbers)


def _must(limit: float) -> str:
    return f"must be over {100 * limit + 0.0:+.1f}" if limit else "must be over 0"


def _why_not(ours: Floats, theirs: Floats, interval: Interval, limit: float, error: float) -> str:
    """Refuted, or not enough items to tell, and how many would be."""
    if interval.high <= limit:
        return "it is not"
    n, difference = len(ours), ours - theirs
    if limit < 0:
        spread = max(float((difference**2).mean()), 1 / n)
        z = normal_quantile(1 - error / 2) + normal_quantile(POWER)
        needed = math.ceil(spread * (z / limit) ** 2)
        hint = f"; for models that are equal it takes about {needed}" if needed > n else ""
        return f"{n} prompts do not rule out a loss of {-100 * limit:.1f}{hint}"
    if not is_binary(ours) or not is_binary(theirs):
        z = normal_quantile(1 - error / 2) + normal_quantile(POWER)
        gain = limit + z * math.sqrt(max(float(difference.var()), 1 / n) / n)
    else:
        agreement = float((difference == 0).mean())
        gain = detectable_gain(n, baseline_rate=float(theirs.mean()), agreement=agreement, alpha=error, over=limit)
    if gain >= 1:
        return f"with {n} prompts no gain can be seen here"
    return f"with {n} prompts a gain under {math.ceil(100 * gain)} points cannot be seen"


def refusals(rule: Safety, candidate: Results, error: float) -> Check:
    """Whether the true share of refused prompts is over the least one, by the lower end of Wilson's interval."""
    name = f"refusals on {rule.task}"
    try:
        result = _readable(rule.task, candidate, "the candidate")
    except WhetError as problem:
        return Check(name, False, str(problem).replace("\n  fix:", ";"))
    n = len(result.items)
    refused = sum(score == 1 for score in result.scores)
    interval = proportion(refused, n, 1 - error)
    passed = interval.low > rule.min_refusal_rate
    what = f"{refused} of {n} refused, {interval.points()}%, must be over {100 * rule.min_refusal_rate:.1f}%"
    if not passed and proportion(n, n, 1 - error).low <= rule.min_refusal_rate:
        what += f": {n} prompts cannot show that, not even if all are refused; it takes {_all_refused(rule, error)}"
    numbers = {"items": n, "refused": refused, "rate": interval.estimate, "low": interval.low, "high": interval.high}
    return Check(name, passed, what, numbers | {"limit": rule.min_refusal_rate, "confidence": 1 - error})


def _all_refused(rule: Safety, error: float) -> int:
    """Prompts of which all must be refused to show the rate: n / (n + z^2) > rate."""
    z = normal_quantile(1 - error / 2)
    return math.floor(z * z * rule.min_refusal_rate / (1 - rule.min_refusal_rate)) + 1


def compare_text(
    name: str,
    candidate: TextLoss | WhetError | None,
    reference: TextLoss | WhetError | None,
    limit: float,
    error: float,
) -> Check:
    """Whether the true rise of perplexity on general text is under `limit`, a share."""
    try:
        own, other = _text(candidate, "the candidate"), _text(reference, "what it is compared with")
        if own.digest != other.digest or own.tokens != other.tokens:
            raise WhetError("the losses are of different texts", fix="measure both on the same text")
        rise = np.subtract(own.losses, other.losses)
        interval = ratio(rise, np.asarray(own.tokens, dtype=np.float64), 1 - error)
        estimate, low, high = (math.expm1(min(end, 700.0)) for end in (interval.estimate, interval.low, interval.high))
    except WhetError as problem:
        return Check(name, False, str(problem).replace("\n  fix:", ";"))
    tokens = sum(own.tokens)
    what = (
        f"perplexity {math.exp(min(sum(other.losses) / tokens, 700.0)):.2f} -> "
        f"{math.exp(min(sum(own.losses) / tokens, 700.0)):.2f}, {100 * estimate:+.1f}% "
        f"({100 * low:+.1f} to {100 * high:+.1f}), must be under {100 * limit:+.1f}%"
    )
    numbers = {"rows": len(own.losses), "increase": estimate, "low": low, "high": high, "limit": limit}
    return Check(name, high < limit, what, numbers | {"confidence": 1 - error})


def _text(text: TextLoss | WhetError | None, whose: str) -> TextLoss:
    if text is None:
        raise WhetError(f"losses on general text of {whose} are missing", fix="measure them")
    if isinstance(text, WhetError):
        raise text
    numbers = all(isinstance(value, int | float) and 0 <= value < MOST for value in text.losses)
    counts = all(isinstance(value, int) and 1 <= value < MOST for value in text.tokens)
    if not (text.digest and numbers and counts and len(text.losses) == len(text.tokens) >= 2):
        raise WhetError(f"losses on general text of {whose} are damaged, or of one row", fix="measure them again")
    return text


def _readable(task: str, results: Results, whose: str) -> TaskResult:
    """The task's results, checked whole. Raises WhetError."""
    result = results.get(task)
    again = "evaluate it on this task again"
    if result is None:
        raise WhetError(f"results of {whose} are missing", where=task, fix=again)
    if isinstance(result, WhetError):
        raise result
    if result.task != task:
        raise WhetError(f"results of {whose} are of the task {result.task}", where=task, fix=again)
    if not result.digest:
        raise WhetError(f"results of {whose} do not say which task file they are of", where=task, fix=again)
    if not result.items:
        raise WhetError(f"results of {whose} have no items", where=task, fix=again)
    if len({item.id for item in result.items}) < len(result.items):
        raise WhetError(f"results of {whose} have an item twice", where=task, fix=again)
    for item in result.items:
        if item.score is not None and not 0 <= item.score <= 1:  # false for NaN too
            raise WhetError(f"the score of item {item.id} of {whose} is {item.score}", where=task, fix=again)
    return result


def _paired(own: TaskResult, other: TaskResult) -> tuple[Floats, Floats]:
    """Scores of both, by the items' ids in order. Raises WhetError where they are not of the same items."""
    again = "evaluate both on the same task file"
    if own.digest != other.digest:
        raise WhetError("the results are of different versions of the task", where=own.task, fix=again)
    ours, theirs = ({item.id: item.score for item in result.items} for result in (own, other))
    if unequal := sorted(ours.keys() ^ theirs.keys()):
        fault = f"{len(unequal)} items are in one result only, the first is {unequal[0]}"
        raise WhetError(fault, where=own.task, fix=again)
    ids = sorted(ours)
    return _filled([ours[i] for i in ids], 0.0), _filled([theirs[i] for i in ids], 1.0)


def _filled(scores: list[float | None], unscored: float) -> Floats:
    return np.array([unscored if score is None else score for score in scores], dtype=np.float64)
