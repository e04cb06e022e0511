"""What the numbers of the steps tell: losses that are no numbers, rates too high or low, adapters that do not move.

Read are the lines "train" of metrics.jsonl, and the lines "watch", in which training told what it met and did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from whet.runs.doctor.findings import CAUSES, Finding
from whet.runs.doctor.series import finite, part, scatter, smooth, spikes

Json = Mapping[str, Any]

LEAST_STEPS = 8
"""Fewer steps show no trend."""

STILL = 0.95
"""The share of steps without a gradient, or without a label, from which on nothing is learned."""

EXPLODED = 100.0
"""Gradient norms so many times above their level before, three steps in a row, explode."""

DIVERGED, RETURNED = 1.1, 1.5
"""The loss at the end against the first loss, and against the lowest one, from which on it diverged."""

HUMP = 1.15
"""A loss so many times above the first ones, three steps in a row, was driven there, even if it comes down again."""

JOLT, NO_GAIN, THROWN = 8.0, 0.8, 1.2
"""Steps that are too long throw the model about: a gradient norm so many times above the first two, and then a loss
that ends above this share of the first, or is so many times above the last three within the next three steps."""

UNMOVED, TRAVEL = 0.01, 3e-4
"""Under Adam no weight moves further than about the sum of the rates. A loss that fell by less than the first of these,
as a share, or than its noise, while weights could travel no further than the second, had too low a rate."""

LOST_MEMORY, LOST_SHARE = 1 << 30, 0.25
"""Bytes, and share of what is reserved, that the allocator holds without a use, from which on it matters."""


@dataclass(frozen=True)
class Steps:
    """Of each step: its number, loss (nats a token), gradient norm before clipping, learning rate. NaN: not logged."""

    numbers: list[int]
    loss: list[float]
    grad_norm: list[float]
    rate: list[float]

    @classmethod
    def of(cls, lines: Sequence[Json]) -> Steps:
        def values(name: str) -> list[float]:
            return [_number(line.get(name)) for line in lines]

        return cls([int(line["step"]) for line in lines], values("loss"), values("grad_norm"), values("learning_rate"))

    def __len__(self) -> int:
        return len(self.numbers)


def find_in_training(lines: Sequence[Json], watched: Sequence[Json] = (), *, fp16: bool = False) -> list[Finding]:
    """lines: of stage train, by step. watched: of stage watch. fp16: whether the loss was scaled."""
    told = list(_told(watched))
    found = [*told, *_memory(watched), *_scale(watched)]
    left_out = {line["place"][0] for line in watched if line.get("action") == "skipped"}
    steps = Steps.of([line for line in lines if line["step"] not in left_out])
    if not steps.numbers:
        return found
    silent = list(_silent(steps))
    if silent:
        return found + silent
    broken = next(_not_a_number(steps, fp16), None)
    if broken and not told:
        found.append(broken)
    if len(steps) >= LEAST_STEPS:
        found += _rate(steps)
        found += _exploding(steps)
    known = {finding.step for finding in told}
    return found + [f for f in _spiking(steps) if f.step not in known]


# ---------------------------------------------------------------- what training told itself


def _told(watched: Sequence[Json]) -> Iterator[Finding]:
    for line in watched:
        if line.get("cause") not in CAUSES:
            continue
        stopped = line.get("action") == "stopped"
        advice = str(line.get("advice") or "see the lines of stage watch in metrics.jsonl")
        where = (
            ", ".join(str(line[name]) for name in ("layer", "rows") if line.get(name))
            or f"step {line.get('failed', line.get('step'))}"
        )
        severity = line.get("severity")
        yield Finding(
            severity=severity if severity in ("error", "warning", "note") else "error" if stopped else "warning",
            cause=line["cause"],
            where=where,
            what=str(line.get("what") or line["cause"]),
            advice=advice,
            step=line.get("failed", line.get("step")),
        )


def _scale(watched: Sequence[Json]) -> Iterator[Finding]:
    """fp16 gradients are scaled up so that they do not underflow; a scale near 1 can't be halved any more."""
    scales = [(line["step"], float(line["loss_scale"])) for line in watched if "loss_scale" in line]
    low = [(step, scale) for step, scale in scales if scale < 1]
    if not low or scales[-1][1] >= 1:
        return
    step, scale = low[0]
    yield Finding(
        "error",
        "fp16 range",
        f"from step {step} on",
        f"the loss scale of fp16 fell from {scales[0][1]:g} to {scale:g}: gradients leave its range at any scale, and "
        "steps are left out",
        "use dtype: bfloat16, or float32 where the card has no bf16; else lower train.learning_rate",
        step,
    )


def _memory(watched: Sequence[Json]) -> Iterator[Finding]:
    """Reserved by the allocator against used at the peak: what lies between can't be given to anyone."""
    for line in watched:
        reserved, used = _number(line.get("reserved")), _number(line.get("allocated_peak"))
        if reserved - used > max(LOST_MEMORY, LOST_SHARE * reserved):
            yield Finding(
                "warning",
                "memory fragmentation",
                f"from step {line['step']} on",
                f"PyTorch holds {reserved / 2**30:.1f} GiB, of which no more than {used / 2**30:.1f} were used at once",
                "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or pack the rows so that batches keep one shape",
                int(line["step"]),
            )
            return


# ---------------------------------------------------------------- what the numbers show


def _silent(steps: Steps) -> Iterator[Finding]:
    """Steps that could teach nothing: no label, or no gradient."""
    norms = [(loss, norm) for loss, norm in zip(steps.loss, steps.grad_norm, strict=True) if math.isfinite(norm)]
    if not norms:
        return
    unlabelled = [i for i, loss in enumerate(steps.loss) if loss == 0 and steps.grad_norm[i] == 0]
    if len(unlabelled) >= STILL * len(steps):
        yield Finding(
            "error",
            "nothing to learn from",
            f"{len(unlabelled):,} of {len(steps):,} steps",
            "loss and gradient are 0: no token of these batches carries loss",
            "look at the rows with `whet run RECIPE --dry-run`; see data.train_on, model.template, max_seq_length",
            steps.numbers[unlabelled[0]],
        )
    elif unlabelled:
        yield Finding(
            "warning",
            "nothing to learn from",
            f"{len(unlabelled):,} of {len(steps):,} steps, the first at {steps.numbers[unlabelled[0]]}",
            "loss and gradient are 0: no token of these batches carries loss",
            "leave out the rows whose answer is cut off, or raise model.max_seq_length",
            steps.numbers[unlabelled[0]],
        )
    elif sum(norm == 0 for _, norm in norms) >= STILL * len(norms):
        yield Finding(
            "error",
            "frozen adapter",
            f"{len(norms):,} steps",
            f"the gradient is 0 although the loss is {norms[-1][0]:.3g}: no weight moves",
            "start from a fresh adapter, and see that its weights require gradients and that one of A and B is not 0",
            steps.numbers[0],
        )


def climbing(losses: Sequence[float]) -> bool:
    """Whether losses that end in none had left their lowest level before."""
    return len(losses) >= LEAST_STEPS and median(losses[-3:]) > DIVERGED * min(smooth(losses, 5))


def _not_a_number(steps: Steps, fp16: bool) -> Iterator[Finding]:
    for i, step in enumerate(steps.numbers):
        norm_is_wrong = not math.isfinite(steps.grad_norm[i]) and not math.isnan(steps.rate[i])
        if math.isfinite(steps.loss[i]) and (fp16 or not norm_is_wrong or _unlogged(steps.grad_norm)):
            continue
        before = finite(steps.loss[:i])
        if climbing(before):
            yield _too_high(steps, f"the loss climbed to {before[-1]:.3g}, then was no number at step {step}", step)
        else:
            yield Finding(
                "error",
                "not a number",
                f"step {step}",
                f"loss {steps.loss[i]}, gradient norm {steps.grad_norm[i]}, without a sign of it in the steps before",
                "run it again: on_nan: back-off names the layer and the rows, and goes on",
                step,
            )
        return


def _unlogged(values: Sequence[float]) -> bool:
    return not finite(values)


def _rate(steps: Steps) -> Iterator[Finding]:
    loss = finite(steps.loss)
    if len(loss) < LEAST_STEPS:
        return
    head, tail, noise = median(loss[:3]), median(part(loss, 2 / 3, 1)), scatter(loss)
    smoothed = smooth(loss, max(3, min(9, len(loss) // 6)))
    lowest = min(smoothed)
    bottom = smoothed.index(lowest)
    travel = sum(rate for rate in steps.rate if math.isfinite(rate))
    came_back = bottom < 2 / 3 * len(loss) and tail > RETURNED * lowest and tail - lowest > max(4 * noise, 0.2)
    if tail > DIVERGED * head and tail - head > max(2 * noise, 0.2):
        yield _too_high(steps, f"the loss rose from {head:.3g} to {tail:.3g}", steps.numbers[bottom])
    elif came_back:
        yield _too_high(steps, f"the loss fell to {lowest:.3g} and rose to {tail:.3g} again", steps.numbers[bottom])
    elif hump := _hump(loss, noise):
        yield _too_high(steps, f"the loss climbed from {max(loss[:3]):.3g} to {max(loss):.3g}", steps.numbers[hump])
    elif jolt := _jolt(steps, no_gain=tail > NO_GAIN * head):
        seen = f"the gradient norm jumped from {max(steps.grad_norm[:2]):.3g} to {steps.grad_norm[jolt]:.3g}"
        after = max(finite(steps.loss[jolt:]))
        yield _too_high(steps, f"{seen}, and the loss went from {head:.3g} up to {after:.3g}", steps.numbers[jolt])
    elif 0 < travel < TRAVEL and head > 0.05 and _unmoved(loss, noise):
        yield Finding(
            "error",
            "learning rate too low",
            f"{len(steps):,} steps",
            f"the loss stayed at {tail:.3g}; with these rates no weight could move by more than {travel:.1g} in all",
            "raise train.learning_rate (1e-4 to 5e-4 is usual for adapters), or find one with the range test",
            steps.numbers[0],
        )


def _hump(loss: Sequence[float], noise: float) -> int | None:
    """The first of three steps in a row whose losses are above all that the run began with."""
    level = max(HUMP * max(loss[:3]), max(loss[:3]) + noise)
    return next((i for i in range(3, len(loss) - 2) if min(loss[i : i + 3]) > level), None)


def _jolt(steps: Steps, no_gain: bool) -> int | None:
    """The first step with a gradient far above those of the beginning, after which the loss rose, or where it did not
    fall in the end."""
    level, loss = JOLT * max(steps.grad_norm[:2]), steps.loss
    for i, norm in enumerate(steps.grad_norm):
        after = finite(loss[i + 1 : i + 4])
        rose = bool(after) and max(after) > THROWN * max(loss[max(0, i - 2) : i + 1])
        if math.isfinite(norm) and norm > level and (no_gain or rose):
            return i
    return None


def _unmoved(loss: Sequence[float], noise: float) -> bool:
    """Whether the last quarter is no lower than the first, as far as noise lets one tell (2.5 of its deviations)."""
    fell = median(part(loss, 0, 1 / 4)) - median(part(loss, 3 / 4, 1))
    return fell < max(UNMOVED * median(loss), 2.5 * noise / math.sqrt(len(loss) / 4))


def _too_high(steps: Steps, seen: str, step: int) -> Finding:
    peak = max(finite(steps.rate), default=math.nan)
    return Finding(
        "error",
        "learning rate too high",
        f"from step {step} on",
        f"{seen}; the rate went up to {peak:.2g}",
        "lower train.learning_rate by ten times, or find one with the range test",
        step,
    )


def _exploding(steps: Steps) -> Iterator[Finding]:
    """Gradients that leave their level while the loss has not yet: clipping hides them from the loss."""
    norms = steps.grad_norm
    for i in range(LEAST_STEPS, len(norms) - 2):
        level = median(finite(norms[max(0, i - 24) : i]) or [math.inf])
        if level > 0 and all(norm > EXPLODED * level for norm in norms[i : i + 3]):
            yield Finding(
                "error",
                "exploding gradients",
                f"from step {steps.numbers[i]} on",
                f"the gradient norm went from {level:.3g} to {norms[i]:.3g} and stayed there",
                "lower train.learning_rate, warm up for longer (train.warmup), or clip harder (train.max_grad_norm)",
                steps.numbers[i],
            )
            return


def _spiking(steps: Steps) -> Iterator[Finding]:
    places = spikes(steps.loss)
    if not places:
        return
    first = places[0]
    several = f" and {len(places) - 1} more times" if len(places) > 1 else ""
    level = median(finite(steps.loss[max(0, first - 24) : first]))
    yield Finding(
        "warning",
        "loss spike",
        f"step {steps.numbers[first]}{several}",
        f"the loss jumped from {level:.3g} to {steps.loss[first]:.3g} and came back: a batch unlike the others",
        "look at the rows of that step; garbled or mislabelled ones cost more than they teach",
        steps.numbers[first],
    )


def _number(value: Any) -> float:
    """NaN for what is no number. Lines of stage watch hold "nan" and "inf" as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
