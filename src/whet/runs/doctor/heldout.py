"""What held-out rows tell: overfitting, and training that brings no gain any more.

Read are the lines "eval" of metrics.jsonl: {"step", "task": "loss", "mean"} of each checkpoint, and the last one, which
has {"base": {"loss"}, "tuned": {"loss"}}. Losses in nats a label token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from whet.runs.doctor.findings import Finding

Json = Mapping[str, Any]

TASK = "loss"
"""The name under which the held-out loss is logged."""

WORSE, MUCH_WORSE = 1.03, 1.2
"""The held-out loss over its lowest one, from which on a run overfits, and from which on that ruins it."""

PATIENCE, GAIN = 3, 0.002
"""So many measurements in a row that gain less than this share show a plateau."""


def find_in_heldout(evaluated: Sequence[Json], train_loss: Sequence[float]) -> list[Finding]:
    """evaluated: the lines of stage eval. train_loss: by step."""
    points = held_out(evaluated)
    found = list(_over_steps(points, train_loss)) or list(_against_base(evaluated, train_loss))
    return found or list(_flat(points))


def held_out(evaluated: Sequence[Json]) -> list[tuple[int, float]]:
    """(step, held-out loss), by step; of a step that was measured twice, the last."""
    lines = [line for line in evaluated if line.get("task") == TASK and isinstance(line.get("step"), int)]
    return sorted({line["step"]: float(line["mean"]) for line in lines}.items())


def _over_steps(points: Sequence[tuple[int, float]], train_loss: Sequence[float]) -> Iterator[Finding]:
    if len(points) < 3:
        return
    best_step, best = min(points, key=lambda point: point[1])
    after = [loss for step, loss in points if step > best_step]
    if len(after) < 2 or min(after[-2:]) < WORSE * best or not _learned(train_loss):
        return
    yield Finding(
        "error" if after[-1] > MUCH_WORSE * best else "warning",
        "overfitting",
        f"from step {best_step} on",
        f"the held-out loss was {best:.4g} at step {best_step} and is {after[-1]:.4g} at step {points[-1][0]}, while "
        f"the training loss fell to {median(train_loss[-5:]):.4g}",
        "stop there: train.early_stop keeps the best checkpoint; else fewer epochs, more rows, or a lower rate",
        best_step,
    )


def _against_base(evaluated: Sequence[Json], train_loss: Sequence[float]) -> Iterator[Finding]:
    """The finished model against its base, where nothing was measured on the way."""
    losses = [(line["base"].get("loss"), line["tuned"].get("loss")) for line in evaluated if _compares(line)]
    if not losses or not _learned(train_loss):
        return
    base, tuned = losses[-1]
    if isinstance(base, int | float) and isinstance(tuned, int | float) and tuned > WORSE * base:
        yield Finding(
            "error",
            "overfitting",
            "the finished model",
            f"the held-out loss rose from {base:.4g} to {tuned:.4g}, while the training loss fell from "
            f"{median(train_loss[:3]):.4g} to {median(train_loss[-5:]):.4g}",
            "fewer epochs, more rows, or a lower rate; train.early_stop keeps the best checkpoint",
        )


def _compares(line: Json) -> bool:
    return isinstance(line.get("base"), Mapping) and isinstance(line.get("tuned"), Mapping)


def _learned(train_loss: Sequence[float]) -> bool:
    return len(train_loss) >= 6 and median(train_loss[-5:]) < 0.95 * median(train_loss[:3])


def _flat(points: Sequence[tuple[int, float]]) -> Iterator[Finding]:
    if len(points) <= PATIENCE + 1:
        return
    before, last = points[:-PATIENCE], points[-PATIENCE:]
    best = min(loss for _, loss in before)
    if min(loss for _, loss in last) > (1 - GAIN) * best:
        yield Finding(
            "note",
            "plateau",
            f"from step {before[-1][0]} on",
            f"the held-out loss stays at {best:.4g}",
            "train.early_stop would end it here; a lower rate at the end (train.schedule: cosine) may gain a little",
            before[-1][0],
        )
