"""What happens beside the training steps of a recipe: metrics, progress, sealed checkpoints, an orderly Ctrl-C."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whet.errors import WhetError
from whet.runs.live import LiveView
from whet.runs.memory import memory
from whet.runs.store import Run
from whet.train.checkpoint import seal

LOGGED = ("loss", "learning_rate", "grad_norm", "epoch", "mean_token_accuracy", "entropy", "num_tokens")


class StepTimes(TrainerCallback):
    """Knows how long a step took: from the end of the step before, but without a checkpoint written in between."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._since = None  # and what callbacks do with a checkpoint is over when the next step begins

    def measure(self, logs: Mapping[str, float]) -> dict[str, float]:
        """seconds and, where they are counted, tokens of the step that `logs` tells of. Nothing waits for the GPU."""
        now, seen = time.perf_counter(), logs.get("num_tokens", 0.0)
        values = {} if self._since is None else {"seconds": round(now - self._since, 4)}
        if seen > self._tokens:
            values["tokens"] = seen - self._tokens
        self._since, self._tokens = now, seen
        return values


class Metrics(StepTimes):
    """Writes each step's numbers to the run, and stops when the loss is no number any more."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        if not logs or "loss" not in logs:
            return
        values = {name: logs[name] for name in logs if name in LOGGED or name.startswith("rewards/")}
        if not math.isfinite(values["loss"]):
            raise WhetError(
                f"the loss became {values['loss']} at step {state.global_step}",
                where=str(self.run.folder),
                fix="lower train.learning_rate; the last good checkpoint stands",
            )
        measured = self.measure(logs)
        self.run.log(stage="train", step=state.global_step, **values, **measured, memory=memory().used)


class Seals(TrainerCallback):
    """Seals each checkpoint after the trainer has written it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class OrderlyStop(TrainerCallback):
    """Ctrl-C ends training after the step at hand, with a checkpoint; a second Ctrl-C ends it at once."""

    stopped = False
    _before: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._before = signal.signal(signal.SIGINT, self._stop)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _stop(self, *args: Any) -> None:
        self.stopped = True
        self.on_train_end()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control


class Bar(StepTimes):
    """The live view of a terminal; on anything else, a line every tenth of the way."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console
        self.view = LiveView(console)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.console.is_terminal:
            self.view.start(state.max_steps, state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        if not logs or "loss" not in logs:
            return
        if self.console.is_terminal:
            values = {name: logs.get(name) for name in ("learning_rate", "grad_norm")}
            self.view.step(state.global_step, logs["loss"], **self.measure(logs), **values)
            return
        every = max(1, state.max_steps // 10)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.console.print(f"  step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.view.stop()
