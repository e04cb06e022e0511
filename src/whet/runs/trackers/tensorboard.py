"""TensorBoard: event files in the run's folder. `tensorboard --logdir runs` shows all runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from torch.utils.tensorboard import SummaryWriter

from whet.runs.trackers.lines import End, Point, Start


class TensorBoard:
    """Opened with the first step of training, from which on what an earlier part of the run wrote is void."""

    name = "tensorboard"

    def __init__(self, start: Start):
        self._start = start
        self._writer: SummaryWriter | None = None

    def write(self, points: Sequence[Point]) -> None:
        steps = [point.step for point in points if any(name.startswith("train/") for name in point.values)]
        writer = self._opened(min(steps, default=None))
        for point in points:
            for name, value in point.values.items():
                writer.add_scalar(name, value, point.step, walltime=point.time)
        writer.flush()

    def close(self, end: End, digests: Mapping[str, str]) -> None:
        writer = self._opened(None)
        if digests:
            writer.add_text("digests", _table(digests))
        writer.add_text("ended", end)
        writer.close()

    def _opened(self, void_from: int | None) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(self._start.folder / "tensorboard", purge_step=void_from)
            self._writer.add_text("recipe", _table(self._start.params))
            self._writer.add_text("tags", _table(self._start.tags))
        return self._writer


def _table(values: Mapping[str, str]) -> str:
    """Markdown that shows the values as they are."""
    return "\n".join(f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
