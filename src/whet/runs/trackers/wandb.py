"""Weights & Biases, offline or online. It gets numbers, the recipe and digests: no code, no git state, no machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

from whet.runs.trackers.lines import End, Point, Start

os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when its process starts

import wandb

try:
    from wandb.analytics.opentelemetry.opentelemetry_proxy import disable
except ImportError:  # versions that have the variable alone
    pass
else:
    disable()

STEP = "train/global_step"


class WeightsAndBiases:
    """One W&B run a run of whet, under its name. Offline ones lie in RUNS/wandb: `wandb sync` sends them."""

    name = "wandb"

    def __init__(self, start: Start, mode: Literal["offline", "online"], project: str):
        settings = wandb.Settings(
            console="off",
            silent=True,
            host="",  # without this, the machine's name
            init_timeout=30,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=project,
            id=start.run,
            name=start.run,
            dir=start.root,
            mode=mode,
            resume="allow" if mode == "online" else None,
            reinit="create_new",
            config={**start.params, **{f"tags.{key}": value for key, value in start.tags.items()}},
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, STEP: point.step, "_timestamp": point.time})

    def close(self, end: End, digests: Mapping[str, str]) -> None:
        self._run.summary.update({"digests": dict(digests), "ended": end})
        self._run.finish(exit_code=0 if end == "done" else 1)
