"""What watching costs a step: the time that training waits for it.

    python bench/watch.py --out bench/results/watch.jsonl [--steps 20000]

Each step gives the watch a line as training logs it, of a loss with noise in which nothing is off. On a GPU the look at
memory counts too, every 25 steps as in training. One JSON line; times in microseconds a step.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from environment import origin

from whet.train.watch import Watch, Watching


class Lines:
    """Stands for a run."""

    def __init__(self) -> None:
        self.logged = 0

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return []

    def log(self, **values: Any) -> None:
        self.logged += 1


def measured(steps: int) -> dict[str, Any]:
    """Microseconds a step, the mean and the slowest of a hundredth of the steps."""
    if torch.cuda.is_available():
        torch.ones(1, device="cuda")
    run: Any = Lines()
    trainer = SimpleNamespace(step_batches=[], train_dataset=None, accelerator=SimpleNamespace(scaler=None))
    watch, chance = Watch(run, trainer, Watching()), random.Random(1)
    arguments: Any = SimpleNamespace(fp16=False)
    state: Any = SimpleNamespace(global_step=0)
    times = []
    for state.global_step in range(1, steps + 1):
        loss = 1 + 2 * math.exp(-state.global_step / 500) + chance.gauss(0, 0.05)
        logs = {"loss": loss, "grad_norm": 0.4, "learning_rate": 1e-4}
        began = time.perf_counter()
        watch.on_log(arguments, state, arguments, logs=logs)
        times.append(time.perf_counter() - began)
    times.sort()
    slow = times[-max(1, steps // 100)]
    return {
        "what": "watch",
        "steps": steps,
        "waited_us": round(1e6 * sum(times) / steps, 1),
        "waited_us_p99": round(1e6 * slow, 1),
        "lines": run.logged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    asked = parser.parse_args()
    line = measured(asked.steps) | origin()
    with open(asked.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"watch: {line['waited_us']} us a step, {line['waited_us_p99']} us at the slowest hundredth", file=sys.stderr)


if __name__ == "__main__":
    main()
