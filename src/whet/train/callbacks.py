"""What happens beside the training steps of a recipe: metrics, progress, sealed checkpoints, an orderly Ctrl-C."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from whet.errors import WhetError
from whet.runs.store import Run
from whet.train.checkpoint import seal

LOGGED = ("loss", "learning_rate", "grad_norm", "epoch", "mean_token_accuracy", "entropy", "num_tokens")


class Metrics(TrainerCallback):
    """Writes each step's numbers to the run, and stops when the loss is no number any more."""

    def __init__(self, run: Run):
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
        self.run.log(stage="train", step=state.global_step, **values)


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


class Bar(TrainerCallback):
    """A progress bar with the loss; on anything but a terminal, a line every tenth of the way."""

    def __init__(self, console: Console):
        self.console = console
        columns = (
            TextColumn("  training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")
        if self.console.is_terminal:
            self.progress.start()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        if not logs or "loss" not in logs:
            return
        self.progress.update(self.task, completed=state.global_step, loss=f"loss {logs['loss']:.4f}")
        every = max(1, state.max_steps // 10)
        if not self.console.is_terminal and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self.console.print(f"  step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.progress.stop()
