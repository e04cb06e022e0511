"""What watching, metrics, live view and trackers cost a training step on this machine.

    python bench/overhead.py --model 1b --steps 400 --out bench/results/overhead.jsonl

One training, in which everything that `whet run` adds to the trainer is on for ten steps and off for the next ten, in
turn; the first step after each switch is left out. So both kinds of steps see the same machine, model and rows. One
JSON line: medians and means of both, in milliseconds a step, and the share that being on adds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from checkpoint import checkpoint
from datasets import Dataset
from environment import origin
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback

from whet.recipe import Recipe
from whet.recipe_model import load_for_training
from whet.runs.store import Run
from whet.runs.trackers import Tracking, open_trackers
from whet.runs.trackers.lines import Start
from whet.train.callbacks import Bar, Metrics
from whet.train.fit import trainer_of
from whet.train.watch import Watch, Watching

BLOCK = 10
FOLDER = Path("build/bench-models")


class Switched(TrainerCallback):
    """Hands a step's events on while it is on, and notes when steps begin."""

    def __init__(self) -> None:
        self.callbacks: list[Any] = []
        self.began: list[float] = []

    @staticmethod
    def is_on(step: int) -> bool:
        return step // BLOCK % 2 == 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.each("on_train_begin", *args, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began.append(time.perf_counter())
        if self.is_on(state.global_step):
            self.each("on_step_begin", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_on(state.global_step - 1):  # this step's begin
            self.each("on_log", args, state, control, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.each("on_train_end", *args, **kwargs)

    def each(self, event: str, *args: Any, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*args, **kwargs)

    def times(self) -> dict[str, list[float]]:
        """Milliseconds of each step by "on" and "off", without those at a switch."""
        found: dict[str, list[float]] = {"on": [], "off": []}
        for step in range(len(self.began) - 1):
            if step % BLOCK and step >= 2 * BLOCK:
                found["on" if self.is_on(step) else "off"].append(1e3 * (self.began[step + 1] - self.began[step]))
        return found


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    recipe = Recipe.model_validate(
        {
            "name": "overhead",
            "model": {"base": str(args.folder), "load": args.load, "max_seq_length": args.seq},
            "adapter": {"r": 16},
            "data": {"sources": [{"path": "none.jsonl"}]},
            "train": {"max_steps": args.steps, "epochs": 1000, "tokens_per_step": args.seq * args.rows,
                      "micro_batch": args.rows, "packing": False, "checkpoint_every": 10 * args.steps},
        }
    )  # fmt: skip
    model, tokenizer = load_for_training(recipe)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(100, 8000, (64, args.seq), generator=generator).tolist()
    with open(os.devnull, "w") as lock, open(os.devnull, "w") as terminal:
        run = Run(folder, recipe, lock)
        switched = Switched()
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = trainer_of(recipe, model, tokenizer, rows, folder / "checkpoints", callbacks=[switched])
        trackers = open_trackers(Tracking(tensorboard=args.tensorboard), Start("overhead", folder, {}, {}, 0))
        run.followers.append(trackers.log)
        bar = Bar(Console(file=terminal, force_terminal=True, width=100))
        switched.callbacks = [Watch(run, trainer, Watching()), Metrics(run), bar]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trackers.close("done")
    times = switched.times()
    on, off = median(times["on"]), median(times["off"])
    return {
        "model": Path(args.model).name, "load": args.load, "rows": args.rows, "seq": args.seq, "steps": args.steps,
        "tensorboard": args.tensorboard, "lines": len(run.metrics("train")),
        "on_ms": round(on, 3), "off_ms": round(off, 3), "on_mean_ms": round(fmean(times["on"]), 3),
        "off_mean_ms": round(fmean(times["off"]), 3), "added": round(on / off - 1, 5),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help="a shape of checkpoint.py, a folder, or builtin:tiny")
    parser.add_argument("--load", default="nf4")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.folder = args.model if args.model.startswith("builtin:") else checkpoint(args.model, FOLDER / args.model)
    with TemporaryDirectory() as folder:
        line = {"kind": "overhead", **measured(args, Path(folder))} | origin("whet", "tensorboard")
    with open(args.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{line['on_ms']} ms a step on, {line['off_ms']} off: {line['added']:+.2%}", file=sys.stderr)


if __name__ == "__main__":
    main()
