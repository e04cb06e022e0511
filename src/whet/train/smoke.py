"""A short training before the long one: a tenth of the rows, one epoch, and the doctor's word on it.

It goes the way of the real one, checkpoint included, so that what would fail after hours fails after minutes: rows that
break a layer, a rate that is far off, a disk without room.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from rich.console import Console

from whet.errors import WhetError
from whet.recipe import Recipe
from whet.runs.doctor.findings import in_order
from whet.runs.doctor.training import LEAST_STEPS, find_in_training
from whet.runs.store import Run
from whet.train.fit import fit
from whet.train.watch import Watching

SHARE = 0.1


def smoke(
    recipe: Recipe, model: Any, tokenizer: Any, rows: Dataset, folder: Path, console: Console, *, share: float = SHARE
) -> dict[str, Any]:
    """Train `model` on a share of the rows for one epoch; numbers to show. The model is used up: load it again.

    folder: where metrics.jsonl is left. Raises WhetError where the training fails, or the doctor finds an error.
    """
    few = part_of(rows, recipe, share)
    train = recipe.train.model_copy(update={"epochs": 1.0, "max_steps": None})
    with open(os.devnull, "w") as no_lock:
        run = Run(folder, recipe.model_copy(update={"train": train}), no_lock)
        try:
            fit(model, tokenizer, few, run, console, watching=Watching(on_nan="stop"))
        except WhetError as error:
            raise WhetError(f"the smoke run failed: {error.what}", where=error.where, fix=error.fix) from error
        finally:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    steps = run.metrics("train")
    for finding in in_order(find_in_training(steps, run.metrics("watch"))):
        if finding.severity == "error":
            what = f"the smoke run failed, {finding.cause}: {finding.what}"
            raise WhetError(what, where=finding.where, fix=finding.advice)
    return {
        "rows": len(few),
        "steps": len(steps),
        "first loss": round(steps[0]["loss"], 4),
        "last loss": round(steps[-1]["loss"], 4),
    }


def part_of(rows: Dataset, recipe: Recipe, share: float) -> Dataset:
    """A share of the rows, drawn by the recipe's seed; as many as show a trend, as far as there are so many."""
    wanted = max(math.ceil(share * len(rows)), LEAST_STEPS * recipe.rows_per_step)
    if wanted >= len(rows):
        return rows
    return rows.select(sorted(random.Random(recipe.seed).sample(range(len(rows)), wanted)))
