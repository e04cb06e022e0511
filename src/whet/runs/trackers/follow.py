"""The thread between a run and its trackers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.runs.trackers.lines import End, Line, Start, Tracker, Tracking, points_of
from whet.runs.trackers.start import digests_of, start_of

log = logging.getLogger("whet")

PAUSE = 5.0
"""Seconds between two rounds of sending. A round costs a tracker about as much for one line as for a hundred."""

PATIENCE = 60.0
"""Seconds that the end of a run waits for its trackers."""


class Trackers:
    """Sends lines on to each tracker, from a thread of its own."""

    def __init__(self, trackers: Sequence[Tracker], *, step: int = 0, pause: float = PAUSE):
        self._trackers, self._step, self._pause = list(trackers), step, pause
        self._waiting: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._end: End = "failed"
        self._digests: Mapping[str, str] = {}
        self._thread = threading.Thread(target=self._work, name="whet-trackers", daemon=True)
        if self._trackers:
            self._thread.start()

    def log(self, line: Line) -> None:
        """Take a line of metrics.jsonl. Never waits and never fails."""
        if self._trackers and not self._ended.is_set():
            self._waiting.put(dict(line))

    def close(self, end: End, digests: Mapping[str, str] | None = None) -> None:
        """Send what waits, tell how the run ended, and wait for that. May be called again."""
        if self._ended.is_set() or not self._thread.is_alive():
            return
        self._end, self._digests = end, digests or {}
        self._ended.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            names = ", ".join(tracker.name for tracker in self._trackers)
            log.warning("%s did not take all in %.0f s; metrics.jsonl has every line", names, PATIENCE)

    def _work(self) -> None:
        while not self._ended.wait(self._pause):
            self._send()
        self._send()
        self._each(lambda tracker: tracker.close(self._end, self._digests))

    def _send(self) -> None:
        lines = []
        while not self._waiting.empty():
            lines.append(self._waiting.get())
        if points := points_of(lines, self._step):
            self._step = max(self._step, *(point.step for point in points))
            self._each(lambda tracker: tracker.write(points))

    def _each(self, work: Callable[[Tracker], None]) -> None:
        """Let each tracker do it; one that fails is not asked again."""
        for tracker in list(self._trackers):
            try:
                work(tracker)
            except Exception as error:  # a server that is down must not end a training
                self._trackers.remove(tracker)
                log.warning(
                    "%s failed and gets no more of this run: %s; metrics.jsonl has every line, and "
                    "`whet runs track` sends it later",
                    tracker.name,
                    _first_line(error),
                )


def open_trackers(tracking: Tracking, start: Start, *, pause: float = PAUSE) -> Trackers:
    """Begin, or go on, following a run. Raises WhetError for a tracker that is not installed or can't be reached."""
    return Trackers(_open_all(tracking, start), step=start.step, pause=pause)


@contextmanager
def following(tracking: Tracking, folder: Path, *, pause: float = PAUSE) -> Iterator[Trackers]:
    """Trackers for the run in `folder`, told at the end whether it was done, stopped by Ctrl-C, or failed."""
    trackers = open_trackers(tracking, start_of(folder), pause=pause)
    end: End = "failed"
    try:
        yield trackers
        end = "done"
    except KeyboardInterrupt:
        end = "stopped"
        raise
    finally:
        trackers.close(end, digests_of(folder))


def send(tracking: Tracking, start: Start, lines: Sequence[Line], end: End, digests: Mapping[str, str]) -> None:
    """Send the lines of a run that is over. Raises WhetError where a tracker fails.

    However often this is done, MLflow holds each line once, and TensorBoard shows it once.
    """
    points = points_of(lines, 0)
    for tracker in _open_all(tracking, start):
        try:
            tracker.write(points)
            tracker.close(end, digests)
        except Exception as error:
            what = f"{tracker.name} did not take the run: {_first_line(error)}"
            fix = "check that it can be reached, and do it again"
            raise WhetError(what, where=f"track.{tracker.name}", fix=fix) from error


def _open_all(tracking: Tracking, start: Start) -> list[Tracker]:
    opened: list[Tracker] = []
    try:
        if tracking.tensorboard:
            opened.append(_opened("tensorboard", _tensorboard, start))
        if tracking.mlflow:
            opened.append(_opened("mlflow", _mlflow, start, tracking.mlflow, tracking.project))
        if tracking.wandb:
            opened.append(_opened("wandb", _wandb, start, tracking.wandb, tracking.project))
    except WhetError:
        for tracker in opened:
            tracker.close("failed", {})
        raise
    return opened


def _opened(extra: str, opener: Callable[..., Tracker], *arguments: Any) -> Tracker:
    where = f"track.{extra}"
    try:
        return opener(*arguments)
    except ImportError as error:
        raise WhetError(f"{extra} is not installed", where=where, fix=f'pip install "whet[{extra}]"') from error
    except WhetError:
        raise
    except Exception as error:
        fix = "check the address and that you are logged in, or leave it out"
        raise WhetError(f"{extra} can't be used: {_first_line(error)}", where=where, fix=fix) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _tensorboard(*arguments: Any) -> Tracker:
    from whet.runs.trackers.tensorboard import TensorBoard

    return TensorBoard(*arguments)


def _mlflow(*arguments: Any) -> Tracker:
    from whet.runs.trackers.mlflow import MLflow

    return MLflow(*arguments)


def _wandb(*arguments: Any) -> Tracker:
    from whet.runs.trackers.wandb import WeightsAndBiases

    return WeightsAndBiases(*arguments)
