"""Results as a table: each task's mean with its interval, and how it stands to another model's answers."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from whet.errors import WhetError
from whet.evals.results import TaskResult
from whet.evals.statistics import Interval, describe_power, holm, mcnemar, mean, paired_difference


def results_table(results: Mapping[str, TaskResult], *, confidence: float = 0.95) -> Table:
    """A line a task, in points of 100."""
    table = _table("task", "scored by", "items", f"score ({confidence:.3g})", "unscored", "seconds")
    for result in results.values():
        table.add_row(
            escape(result.task),
            escape(result.scorer),
            f"{len(result.items):,}",
            mean(result.scores, confidence).points(),
            _unscored(result),
            f"{result.seconds:.1f}",
        )
    return table


def comparison_table(
    results: Mapping[str, TaskResult], other: Mapping[str, TaskResult], *, confidence: float = 0.95
) -> Table:
    """The same, with the other model's mean and the difference on the same items.

    p: McNemar's, of tasks whose scores are 0 or 1, by Holm for their number. Raises WhetError unless both have answered
    the same questions of every task.
    """
    pairs = {name: paired(result, other.get(name)) for name, result in results.items()}
    binary = {name: own for name, own in pairs.items() if all(set(scores) <= {0.0, 1.0} for scores in own)}
    p = holm({name: mcnemar(*own) for name, own in binary.items()}) if binary else {}
    than = next(iter(other.values())).model
    table = _table("task", "items", f"score ({confidence:.3g})", escape(than), "difference", "p", "unscored")
    for name, result in results.items():
        own, theirs = pairs[name]
        table.add_row(
            escape(name),
            f"{len(own):,}",
            mean(own, confidence).points(),
            f"{100 * mean(theirs, confidence).estimate:.1f}",
            _difference(paired_difference(own, theirs, confidence=confidence)),
            f"{p[name]:.3g}" if name in p else "",
            _unscored(result),
        )
    return table


def power_notes(results: Mapping[str, TaskResult], confidence: float = 0.95) -> list[str]:
    """For each task of 0/1 scores, what gain so few items can't show."""
    return [
        f"{name}: {describe_power(len(result.items), baseline_rate=result.mean, alpha=1 - confidence)}"
        for name, result in results.items()
        if set(result.scores) <= {0.0, 1.0}
    ]


def paired(result: TaskResult, other: TaskResult | None) -> tuple[list[float], list[float]]:
    """Both models' scores of the same items, in one order. Raises WhetError where they have not the same."""
    fix = f"evaluate both on the task {result.task} as it is now"
    if other is None:
        raise WhetError("the other model has no results of this task", where=result.task, fix=fix)
    theirs = {item.id: item.score or 0.0 for item in other.items}
    if other.digest != result.digest or theirs.keys() != {item.id for item in result.items}:
        raise WhetError("the results are of other questions, references or settings", where=result.task, fix=fix)
    return result.scores, [theirs[item.id] for item in result.items]


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("task", "scored by") else "right", no_wrap=True)
    return table


def _difference(interval: Interval) -> str:
    color = "green" if interval.low > 0 else "red" if interval.high < 0 else "default"
    return f"[{color}]{interval.points(signed=True)}[/]"


def _unscored(result: TaskResult) -> str:
    return f"[yellow]{result.unscored:,}[/]" if result.unscored else "0"
