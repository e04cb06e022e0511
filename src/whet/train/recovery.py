"""What becomes of a training whose step made no number: find the cause, go back, change one thing, go on.

    a weight of the base is damaged    stop: no batch can be learned from it
    a batch breaks the good weights    leave that micro-batch out
    the good weights stand the batch   a step between broke them: lower the learning rate

Actions are lines of stage "watch" in the run's metrics, so that a run that is killed and started again takes them too:
"step" is the one that it went back to, "failed" the one that made no number.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whet.errors import WhetError
from whet.runs.doctor.training import climbing
from whet.runs.store import Run
from whet.train.batches import Batch, Place, rows_of
from whet.train.checkpoint import newest_whole
from whet.train.probe import Fault, damaged_weights, first_fault
from whet.train.restore import StartingWeights, load_weights
from whet.train.watch import Diverged, Watching, rows_text


@dataclass(frozen=True)
class Verdict:
    """Why a step failed. place: the micro-batch to leave out; None where the rate is to be lowered."""

    cause: str
    what: str
    advice: str
    layer: str | None = None
    rows: str | None = None
    place: Place | None = None


class Recovery:
    """The good state to go back to, and what earlier failures of this run have changed.

    rate: what the learning rate is multiplied with. skipped: micro-batches that are left out. count: back-offs so far.
    """

    def __init__(self, run: Run, model: Any, watching: Watching):
        self.run, self.model, self.watching = run, model, watching
        self.start = StartingWeights(model)
        self.rate, self.count = 1.0, 0
        self.skipped: frozenset[Place] = frozenset()
        for line in run.metrics("watch"):
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if line.get("action") == "skipped":
            self.skipped |= {(int(line["place"][0]), int(line["place"][1]))}
        elif line.get("action") == "lowered the rate":
            self.rate = float(line["rate"])
        else:
            return
        self.count += 1

    def recover(self, trainer: Any, failure: Diverged) -> None:
        """Put good weights back and decide what to change. Raises WhetError where training is to stop."""
        trainer.optimizer = trainer.lr_scheduler = None  # their memory is the probe's
        trainer.accelerator.free_memory()
        gc.collect()
        checkpoint = self._go_back(failure)
        verdict = self._verdict(trainer, failure)
        line: dict[str, Any] = {"step": _step_of(checkpoint), "failed": failure.step, "cause": verdict.cause}
        line |= {"what": f"{failure.seen}: {verdict.what}", "advice": verdict.advice}
        line |= {name: value for name in ("layer", "rows") if (value := getattr(verdict, name))}
        stop = self._reason_to_stop(verdict)
        if stop is not None:
            self.run.log(stage="watch", **line, severity="error", action="stopped")
            where = f"{self.run.folder}, {verdict.rows}" if verdict.rows else str(self.run.folder)
            raise WhetError(f"{failure.seen}: {verdict.what}{stop}", where=where, fix=verdict.advice)
        if verdict.place is not None:
            line |= {"action": "skipped", "place": list(verdict.place)}
        else:
            line |= {"action": "lowered the rate", "rate": self.rate * self.watching.factor}
        self.run.log(stage="watch", **line, severity="warning")
        self._take(line)

    def _reason_to_stop(self, verdict: Verdict) -> str | None:
        if verdict.cause == "damaged weights" or self.watching.on_nan == "stop":
            return ""
        if self.count >= self.watching.backoffs:
            return f", after going back {self.count} times" if self.count != 1 else ", after going back once"
        return None

    def _go_back(self, failure: Diverged) -> Path | None:
        """Good weights for the model: the newest whole checkpoint's, which is returned, or those of the start."""
        folder = self.run.folder / "checkpoints"
        checkpoint = newest_whole(folder) if folder.is_dir() else None
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        elif not self.start.put_back(self.model):
            raise WhetError(
                f"{failure.seen}, before the first checkpoint",
                where=str(self.run.folder),
                fix="lower train.learning_rate, and train.checkpoint_every",
            )
        return checkpoint

    def _verdict(self, trainer: Any, failure: Diverged) -> Verdict:
        if damaged := damaged_weights(self.model):
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            what = f"the weight {damaged[0]}{more} holds numbers that are none"
            return Verdict("damaged weights", what, "fetch or make the model's files again", layer=damaged[0])
        for i, batch in enumerate(trainer.step_batches):
            if fault := first_fault(trainer, batch):
                if other_rows_break(trainer, batch):
                    what = f"even other rows break in {fault.layer}: {fault.what}"
                    advice = "fetch or make the model's files again; if they are whole, use another model.dtype"
                    return Verdict("damaged weights", what, advice, layer=fault.layer)
                return self._bad_batch(trainer, (failure.step, i), fault)
        advice = "lower train.learning_rate, or find one with the range test"
        if climbing(failure.recent):
            return Verdict(
                "learning rate too high", "the loss had climbed, and the steps before broke the weights", advice
            )
        return Verdict("not a number", "its rows are sound with the last good weights: a step since broke them", advice)

    def _bad_batch(self, trainer: Any, place: Place, fault: Fault) -> Verdict:
        own = rows_of(trainer.step_batches[place[1]], trainer.train_dataset)
        rows = rows_text([row for row in own if breaks(trainer, row)] or own)
        what = f"micro-batch {place[1] + 1} breaks in {fault.layer}: {fault.what}"
        return Verdict("bad batch", what, "look at these rows; leave them out", fault.layer, rows, place)


def other_rows_break(trainer: Any, batch: Batch) -> bool:
    """Whether two rows of the data set that are none of a batch's break the weights too."""
    own, count = set(rows_of(batch, trainer.train_dataset)), len(trainer.train_dataset)
    others = [i for i in (0, count - 1, *range(1, count - 1)) if i not in own][:2] if own else []
    return bool(others) and all(breaks(trainer, i) for i in others)


def breaks(trainer: Any, row: int) -> bool:
    """Whether a row of the data set, alone, makes a NaN or an infinity."""
    return first_fault(trainer, trainer.data_collator([trainer.train_dataset[row]])) is not None


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def free(trainer: Any) -> None:
    """Let a trainer's memory go before another is made."""
    trainer.optimizer = trainer.lr_scheduler = None
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
