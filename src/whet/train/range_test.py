"""Learning-rate range test: the rate rises from step to step, and where the loss stops falling tells the highest one.

    rate(i) = lowest * (highest / lowest) ** (i / (steps - 1)),   i = 0 .. steps - 1

The suggestion is a tenth of the rate at the lowest smoothed loss: there the loss still falls, with room below what
breaks it. The test ends as soon as the loss is four times its lowest, or no number. Weights and random state are put
back afterwards. Source: Smith 2017, arXiv:1506.01186.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from whet.errors import WhetError
from whet.files import write_text
from whet.recipe import Recipe
from whet.train.fit import trainer_of
from whet.train.restore import MOST, StartingWeights

LOWEST, HIGHEST, STEPS = 1e-6, 1e-1, 60
DIVERGED = 4.0
SMOOTHING = 0.7
FELL = 0.02
"""The share by which the loss must fall for the test to have shown anything."""


@dataclass(frozen=True)
class RangeTest:
    """rates, losses (nats a token) and smoothed losses, by step. suggested: a peak rate; None where the
    loss never fell.

    diverged: the rate at which the test ended early; None where it went to the end.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggested: float | None
    diverged: float | None

    def save(self, path: Path) -> None:
        """As JSON. The loss that ended the test may be no number, and is null then."""
        values = asdict(self) | {"losses": [loss if math.isfinite(loss) else None for loss in self.losses]}
        write_text(path, json.dumps(values, indent=1) + "\n")


def range_test(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
) -> RangeTest:
    """Try rates from `lowest` to `highest` in `steps` optimizer steps on the recipe's rows. Raises WhetError."""
    check_range(lowest, highest, steps)
    start = StartingWeights(model)
    if not start.values:
        raise WhetError(
            f"the weights that train exceed {MOST >> 30} GiB, of which no copy is made to put back",
            where="range test",
            fix="test with an adapter, and take a tenth of its rate for training every weight",
        )
    ramp = Ramp(lowest, highest, steps)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with TemporaryDirectory() as folder, torch.random.fork_rng(devices=devices):
        epochs = math.ceil(steps * recipe.rows_per_step / len(rows))
        changes = {
            "max_steps": steps,
            "num_train_epochs": epochs,
            "save_strategy": "no",
            "lr_scheduler_type": "constant",
        }
        trainer = trainer_of(recipe, model, tokenizer, rows, Path(folder), [ramp], warmup_steps=0, **changes)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            start.put_back(model)
    return judged(ramp.rates[: len(ramp.losses)], ramp.losses)


def check_range(lowest: float, highest: float, steps: int) -> None:
    """Raises WhetError for rates that do not rise, and for too few steps to tell."""
    if not 0 < lowest < highest or steps < 10:
        raise WhetError(
            "a range test needs 0 < lowest < highest, and 10 steps or more",
            where=f"lowest {lowest:g}, highest {highest:g}, steps {steps}",
            fix=f"leave them out: {LOWEST:g} to {HIGHEST:g} in {STEPS} steps",
        )


class Ramp(TrainerCallback):
    """Sets each step's rate, keeps its loss, and ends the training that diverges."""

    def __init__(self, lowest: float, highest: float, steps: int):
        self.rates = [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = self.rates[state.global_step]

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            if _diverged(self.losses):
                control.should_training_stop = True


def judged(rates: list[float], losses: list[float]) -> RangeTest:
    """What the losses of rising rates tell."""
    over = _diverged(losses)
    smooth = smoothed(losses[:-1] if over else losses)
    low = min(range(len(smooth)), key=smooth.__getitem__, default=0)
    fell = bool(smooth) and _fell(losses[: len(smooth)], smooth[low])
    return RangeTest(rates, losses, smooth, rates[low] / 10 if fell else None, rates[-1] if over else None)


def _fell(losses: list[float], low: float) -> bool:
    """Whether the smoothed loss came down to `low` by learning: by more than batches differ from one another.

    It must lie below the mean of the first quarter by four standard deviations of that difference, being the lowest of
    many. Those of a step's loss are taken from second differences, which a steady fall leaves alone.
    """
    start = losses[: max(1, len(losses) // 4)]
    bends = [a - 2 * b + c for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    of_a_step = sum(bend * bend for bend in bends) / (6 * max(1, len(bends)))
    deviation = math.sqrt(of_a_step * (1 / len(start) + (1 - SMOOTHING) / (1 + SMOOTHING)))
    first = sum(start) / len(start)
    return first - low > max(FELL * first, 4 * deviation)


def smoothed(losses: list[float]) -> list[float]:
    """Exponential means that do not lag at the start: each is divided by the weight it has so far."""
    total, weight, found = 0.0, 0.0, []
    for loss in losses:
        total, weight = SMOOTHING * total + (1 - SMOOTHING) * loss, SMOOTHING * weight + (1 - SMOOTHING)
        found.append(total / weight)
    return found


def _diverged(losses: list[float]) -> bool:
    return bool(losses) and (not math.isfinite(losses[-1]) or losses[-1] > DIVERGED * min(losses))


def plot(test: RangeTest, path: Path) -> None:
    """Loss against the rate, with the suggestion, as a PNG. Raises WhetError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise WhetError("plots need matplotlib", where=str(path), fix='pip install "whet[plots]"') from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color="#b9c7d8", linewidth=1, label="each step")
    axes.plot(test.rates[: len(test.smoothed)], test.smoothed, color="#1f4e79", linewidth=2, label="smoothed")
    if test.suggested is not None:
        axes.axvline(test.suggested, color="#b5541c", linestyle="--", label=f"suggested: {test.suggested:.1e}")
    axes.set(title="Learning-rate range test", xlabel="learning rate", ylabel="loss (nats a token)", xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
