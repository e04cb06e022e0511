"""What metrics, live view and trackers cost a step: time that training waits, and processor time beside it.

    python bench/tracking.py --out bench/results/tracking.jsonl [--steps 200] [--step-seconds 0.1]

A step here is a sleep, as the host sleeps while a GPU works; then the callbacks get a line as training gives it.
Waiting is the time inside their calls. Beside it, threads draw and send: their processor time is the process's, less
the main thread's. Both are in microseconds a step. One JSON line for each set of what is on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from environment import origin
from rich.console import Console

from whet.runs.trackers import Trackers, Tracking, open_trackers
from whet.runs.trackers.lines import Start
from whet.train.callbacks import Bar, Metrics

SETS = {
    "metrics": Tracking(),
    "metrics, live view": Tracking(),
    "metrics, live view, tensorboard": Tracking(tensorboard=True),
    "metrics, live view, mlflow": Tracking(mlflow="sqlite"),
    "metrics, live view, wandb offline": Tracking(wandb="offline"),
}


class Lines:
    """Stands for a run: each line goes to a file and to the trackers."""

    def __init__(self, folder: Path, trackers: Trackers):
        self.folder, self.trackers = folder, trackers

    def log(self, **values: Any) -> None:
        line = {"time": round(time.time(), 3), **values}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.trackers.log(line)


def measured(name: str, steps: int, step_seconds: float) -> dict[str, Any]:
    """Microseconds a step that training waits, and that other threads compute."""
    with TemporaryDirectory() as place, open("/dev/null", "w") as nowhere:
        folder = Path(place) / "runs" / "bench"
        folder.mkdir(parents=True)
        trackers = open_trackers(SETS[name], Start("bench", folder, {"train.learning_rate": "0.0001"}))
        run: Any = Lines(folder, trackers)
        callbacks: list[Any] = [Metrics(run)]
        if "live view" in name:
            callbacks.append(Bar(Console(file=nowhere, force_terminal=True, width=120)))
        state: Any = SimpleNamespace(max_steps=steps, global_step=0)
        for callback in callbacks:
            callback.on_train_begin(None, state, None)
        waited, process, thread = 0.0, time.process_time(), time.thread_time()
        for state.global_step in range(1, steps + 1):
            for callback in callbacks:
                callback.on_step_begin()
            time.sleep(step_seconds)
            logs = {"loss": 1.0, "grad_norm": 0.4, "learning_rate": 1e-4, "num_tokens": 16384.0 * state.global_step}
            began = time.perf_counter()
            for callback in callbacks:
                callback.on_log(None, state, None, logs=logs)
            waited += time.perf_counter() - began
        beside = (time.process_time() - process) - (time.thread_time() - thread)
        for callback in callbacks:
            callback.on_train_end(None, state, None)
        trackers.close("done")
    return {
        "what": name,
        "steps": steps,
        "step_seconds": step_seconds,
        "waited_us": round(1e6 * waited / steps, 1),
        "beside_us": round(1e6 * beside / steps, 1),
        "waited_share": round(waited / steps / step_seconds, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-seconds", type=float, default=0.1)
    asked = parser.parse_args()
    where = origin("mlflow", "wandb", "tensorboard", "rich")
    for name in SETS:
        line = measured(name, asked.steps, asked.step_seconds) | where
        with open(asked.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: {line['waited_us']} us waited, {line['beside_us']} us beside, a step", file=sys.stderr)


if __name__ == "__main__":
    main()
