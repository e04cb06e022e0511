"""Runs a pure function over many inputs: on all cores of this machine, or on a Ray cluster. The results are the same.

    for result in engine(name, workers).map(function, items): ...      in the order of the items

The function is one of a module's own, as processes are started anew and import it; it takes an item and gives back
little, as what is large goes through files. Results come in order, as soon as they and those before are there.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from whet.errors import WhetError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items a worker that are handed out before the first result is taken."""


class Engine(Protocol):
    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]: ...

    def close(self) -> None: ...


def engine(name: str, workers: int | None = None) -> Engine:
    """name: local or ray. workers: local processes at once; None: as many as there are cores for this process."""
    return RayData() if name == "ray" else Local(workers or cores())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Local:
    """Processes on this machine, which stay until `close`. One item, or with one worker all, is run in this process."""

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        if self.workers == 1 or len(items) <= 1:
            yield from map(function, items)
            return
        pool = self._started()
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_lean, function, item))
                if len(waiting) > AHEAD * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WhetError(
                "a worker process was killed, most likely because memory ran out",
                where="data",
                fix="run again with fewer workers, as: --workers 1; what was done is kept",
            ) from error
        except BaseException:
            self.close()
            raise

    def _started(self) -> ProcessPoolExecutor:
        """Neither forked with this process's threads and locks, nor left behind when it is killed."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_worker)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _lean(function: Callable[[Item], Result], item: Item) -> Result:
    """The function's result; what its tables took goes back to the system, not to this worker's next item."""
    import pyarrow as pa  # type: ignore[import-untyped]

    try:
        return function(item)
    finally:
        pa.default_memory_pool().release_unused()


def _worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class RayData:
    """Ray Data on the cluster that RAY_ADDRESS names, whose nodes all see the same files.

    No cluster is started here: Ray's head asks the network which cloud it is in, and that is not ours to do.
    """

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        if not items:
            return
        ray = _joined()
        rows = ray.data.from_items([{"at": i} for i in range(len(items))])
        done = rows.repartition(len(items)).map(_Numbered(function, items))
        found = {row["at"]: row["outcome"] for row in done.iter_rows()}
        for i in range(len(items)):
            outcome = found[i]
            if isinstance(outcome.error, Exception):
                raise outcome.error
            yield outcome.result

    def close(self) -> None:
        """The cluster is someone else's."""


@dataclass(frozen=True)
class _Outcome:
    """What a function gave, or the user's fault that it raised, which Ray would wrap in errors of its own."""

    result: Any = None
    error: WhetError | None = None


class _Numbered:
    """A function of a numbered item, as Ray Data keeps no order."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]):
        self.function, self.items = function, items

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            outcome = _Outcome(self.function(self.items[row["at"]]))
        except WhetError as error:
            outcome = _Outcome(error=error)
        return {"at": row["at"], "outcome": outcome}


def _joined() -> Any:
    """Ray, in its cluster."""
    if not os.environ.get("RAY_ADDRESS"):
        raise WhetError(
            "engine: ray needs a cluster, and RAY_ADDRESS names none",
            where="data.engine",
            fix="ray start --head, then RAY_ADDRESS=127.0.0.1:6379 whet prep ...; for one machine: engine: local",
        )
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise WhetError("engine: ray needs Ray", where="data.engine", fix='pip install "whet[ray]"') from error
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            fix = "check RAY_ADDRESS; ray status says whether the cluster is up"
            what = f"no Ray cluster answers at {os.environ['RAY_ADDRESS']}"
            raise WhetError(what, where="data.engine", fix=fix) from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
