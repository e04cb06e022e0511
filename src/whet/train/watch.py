"""Watches a training: numbers that are none, spikes, batches without labels, adapters that do not move, held-out loss.

A step costs a few comparisons of numbers that the trainer has logged anyway. Batches and layers are looked into only
when something is off, and memory and the loss scale of fp16 every `Watching.every` steps: nothing else waits for the
GPU. What is met goes to metrics.jsonl as lines of stage "watch", which `whet doctor run` reads:

    {"stage": "watch", "step", "cause", "severity", "what", "advice", "rows", "layer", "action", ...}   (recovery.py)
    {"stage": "watch", "step", "reserved", "allocated_peak", "loss_scale"}          every so many steps
    {"stage": "eval", "step", "task": "loss", "mean", "seconds"}                    the held-out loss of a checkpoint
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whet.errors import WhetError
from whet.runs.doctor.heldout import TASK, WORSE, held_out
from whet.runs.doctor.series import SPIKE_WINDOW, is_spike
from whet.runs.store import Run
from whet.train.batches import labelled, rows_of

STILL = 10
"""Steps in a row without a gradient, after which an adapter counts as frozen."""

SKIPPED = 20
"""Steps in a row that fp16 left out, after which its range is too small. Some at the start are usual."""

TOLD = 5
"""Findings of one kind that are written down, and whose rows are looked for."""


@dataclass(frozen=True)
class EarlyStop:
    """Stop after `patience` held-out losses in a row that are not lower than the best by the share `min_gain`."""

    patience: int = 3
    min_gain: float = 0.002


@dataclass(frozen=True)
class Watching:
    """on_nan: "back-off": leave out the batch, or lower the rate by `factor`, and go on from the last good state, up to
    `backoffs` times; "stop": say what it was, and stop. every: steps between looks at memory and loss scale."""

    on_nan: Literal["back-off", "stop"] = "back-off"
    backoffs: int = 3
    factor: float = 0.5
    every: int = 25
    early_stop: EarlyStop | None = None


NAMED = 20
"""Rows that are named of a step."""


class Diverged(Exception):
    """A step's loss or gradient is no number: its weights can't be kept. recent: the losses before it."""

    def __init__(self, step: int, loss: float, grad_norm: float, recent: Sequence[float] = ()):
        self.step, self.loss, self.grad_norm, self.recent = step, loss, grad_norm, list(recent)
        super().__init__(f"the loss became {loss} at step {step} (gradient norm {grad_norm})")

    @property
    def seen(self) -> str:
        """In words, the loss first where it is the one that is no number."""
        if not math.isfinite(self.loss):
            return f"the loss became {self.loss} at step {self.step}"
        return f"the gradient norm became {self.grad_norm} at step {self.step}"


class Watch(TrainerCallback):
    """Raises Diverged where a step must be undone, WhetError where going on is of no use.

    trainer: a trainer of `train.batches`. heldout: measures the loss of held-out rows (nats a token) with the model as
    it is, and leaves training as it was; called at each checkpoint. rate: what the learning rate is multiplied with.
    """

    def __init__(
        self, run: Run, trainer: Any, watching: Watching, heldout: Callable[[], float] | None = None, rate: float = 1.0
    ):
        self.run, self.trainer, self.watching, self.heldout, self.rate = run, trainer, watching, heldout, rate
        self.losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.without_gradient = self.left_out = 0
        self.told: dict[str, int] = {}
        self.points = held_out(run.metrics("eval"))
        self.ended: str | None = None

    # ------------------------------------------------------------ the trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not any(p.requires_grad for p in kwargs["model"].parameters()):
            raise WhetError(
                "no weight of the model is trained: its adapter is frozen",
                where=str(self.run.folder),
                fix="start from a fresh adapter, or load it with is_trainable=True",
            )
        self.points = [point for point in self.points if point[0] <= state.global_step]
        self._protect_best(args, state)
        if self.rate != 1.0:
            _set_rate(kwargs["optimizer"], kwargs["lr_scheduler"], args.learning_rate * self.rate)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss, norm, step = logs["loss"], logs.get("grad_norm", math.nan), state.global_step
        self._check_finite(step, loss, norm, "grad_norm" in logs, args.fp16)
        if loss == 0 and norm == 0:
            self._no_labels(step)
            return
        if norm == 0:
            self._no_gradient(step, loss)
        else:
            self.without_gradient = 0
        if is_spike(loss, list(self.losses)):
            self._spike(step, loss)
        self.losses.append(loss)
        if step % self.watching.every == 0:
            self._look(step, args.fp16)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.heldout is None or any(step == state.global_step for step, _ in self.points):
            return
        began = time.perf_counter()
        loss = self.heldout()
        self.run.log(
            stage="eval",
            step=state.global_step,
            task=TASK,
            mean=loss,
            seconds=round(time.perf_counter() - began, 3),
        )
        self.points.append((state.global_step, loss))
        self._protect_best(args, state)
        self._maybe_stop(state.global_step, control)

    # ------------------------------------------------------------ a step's numbers

    def _check_finite(self, step: int, loss: float, norm: float, has_norm: bool, fp16: bool) -> None:
        if not math.isfinite(loss):
            raise Diverged(step, loss, norm, self.losses)
        if not has_norm or math.isfinite(norm):
            self.left_out = 0
            return
        if not fp16:
            raise Diverged(step, loss, norm, self.losses)
        self.left_out += 1  # the scaler leaves such a step out and halves its scale
        if self.left_out >= SKIPPED:
            advice = "use dtype: bfloat16, or float32 where the card has no bf16"
            what = f"fp16 left out {SKIPPED} steps in a row: gradients are out of its range at any scale"
            self._tell(step, "fp16 range", "error", what, advice, action="stopped")
            raise WhetError(what, where=f"{self.run.folder}, step {step}", fix=advice)

    def _no_labels(self, step: int) -> None:
        batches = self.trainer.step_batches
        if any(labelled(batch) for batch in batches):
            return  # left out, or every token is predicted for certain
        what = "no token of this step's rows carries loss"
        advice = "leave these rows out, raise model.max_seq_length, or see data.train_on"
        self._tell(step, "nothing to learn from", "warning", what, advice, rows=True)
        self.without_gradient += 1
        if self.without_gradient >= STILL:
            what = f"no token of the last {STILL} steps' rows carries loss"
            raise WhetError(what, where=f"{self.run.folder}, step {step}", fix=advice)

    def _no_gradient(self, step: int, loss: float) -> None:
        self.without_gradient += 1
        if self.without_gradient < STILL:
            return
        what = f"the gradient was 0 for {STILL} steps while the loss is {loss:.3g}: the adapter is frozen"
        advice = "start from a fresh adapter: its weights must require gradients, and A and B can't both be 0"
        self._tell(step, "frozen adapter", "error", what, advice, action="stopped")
        raise WhetError(what, where=f"{self.run.folder}, step {step}", fix=advice)

    def _spike(self, step: int, loss: float) -> None:
        usual = sorted(self.losses)[len(self.losses) // 2]
        what = f"the loss jumped from {usual:.3g} to {loss:.3g}"
        self._tell(
            step, "loss spike", "warning", what, "look at these rows: are they garbled or mislabelled?", rows=True
        )

    def _look(self, step: int, fp16: bool) -> None:
        """Counts that the host has, and the loss scale, for which the device is waited for."""
        values: dict[str, float] = {}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            stats = torch.cuda.memory_stats_as_nested_dict()
            values["reserved"] = stats["reserved_bytes"]["all"]["current"]
            values["allocated_peak"] = stats["allocated_bytes"]["all"]["peak"]
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        if fp16 and scaler is not None:
            values["loss_scale"] = scaler.get_scale()
        if values:
            self.run.log(stage="watch", step=step, **values)

    # ------------------------------------------------------------ held-out loss

    def best(self) -> tuple[int, float] | None:
        """Step and held-out loss of the best checkpoint."""
        return min(self.points, key=lambda point: point[1], default=None)

    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the lowest held-out loss, where early stopping is asked for and it is not the last."""
        best = self.best()
        if self.watching.early_stop is None or best is None or best[0] == self.trainer.state.global_step:
            return None
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{best[0]}"
        return folder if folder.is_dir() else None

    def _protect_best(self, args: TrainingArguments, state: TrainerState) -> None:
        """The trainer keeps the newest two checkpoints, and the one that its state calls the best."""
        best = self.best()
        if self.watching.early_stop is None or best is None:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{best[0]}"
        if folder.is_dir():
            state.best_global_step, state.best_metric, state.best_model_checkpoint = best[0], best[1], str(folder)

    def _maybe_stop(self, step: int, control: TrainerControl) -> None:
        rule = self.watching.early_stop
        if rule is None or len(self.points) <= rule.patience:
            return
        losses = [loss for _, loss in self.points]
        before, last = min(losses[: -rule.patience]), losses[-rule.patience :]
        if min(last) < (1 - rule.min_gain) * before:
            return
        best = self.best()
        assert best is not None
        rising = last[-1] > WORSE * best[1]
        self.ended = "overfitting" if rising else "plateau"
        what = f"the held-out loss was lowest, {best[1]:.4g}, at step {best[0]}, and is {last[-1]:.4g} now"
        advice = f"training ended early with the checkpoint of step {best[0]}"
        severity = "warning" if rising else "note"
        self._tell(step, self.ended, severity, what, advice, action="stopped early", kept=best[0])
        control.should_training_stop = True

    def _rows(self) -> list[int]:
        """The rows of the data set that the step was made of."""
        dataset = self.trainer.train_dataset
        return [row for batch in self.trainer.step_batches for row in rows_of(batch, dataset)]

    def _tell(
        self, step: int, cause: str, severity: str, what: str, advice: str, rows: bool = False, **more: Any
    ) -> None:
        self.told[cause] = self.told.get(cause, 0) + 1
        if self.told[cause] > TOLD:
            return
        if rows and (found := self._rows()):
            more["rows"] = rows_text(found)
        self.run.log(stage="watch", step=step, cause=cause, severity=severity, what=what, advice=advice, **more)


def rows_text(rows: Sequence[int]) -> str:
    """As "rows 4, 17 of data/train"; empty where there are none."""
    named = ", ".join(map(str, rows[:NAMED]))
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"row{'s' * (len(rows) > 1)} {named}{more} of data/train" if rows else ""


def _set_rate(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Make `rate` the peak of a schedule that goes on; a checkpoint holds the peak of before."""
    old = scheduler.base_lrs[0]
    if not old:
        return
    scheduler.base_lrs = [rate for _ in scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= rate / old
        group["initial_lr"] = rate
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
