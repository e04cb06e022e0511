"""The engine's thread: takes orders between steps, runs a step, hands over what it said.

Sequences, pages and the model belong to this thread alone, so nothing of theirs is locked. Others post orders; answers
leave by `deliver`, which is called once a step with all pieces of that step.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from whet.serve.engines.in_process.runner import Runner
from whet.serve.engines.in_process.scheduler import Part, Scheduler
from whet.serve.engines.in_process.sequence import Sequence
from whet.serve.engines.in_process.settings import Settings
from whet.serve.interface import EngineDown, Piece

log = logging.getLogger("whet")

Delivery = tuple[Callable[[Piece | Exception], None], Piece | Exception]
STOPPED = "the server is stopping"


class Worker:
    """Runs sequences on one model until `stop`."""

    def __init__(self, folder: str, settings: Settings, deliver: Callable[[list[Delivery]], None]):
        self._folder, self._settings, self._deliver = folder, settings, deliver
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._outbox: list[Delivery] = []
        self._thread = threading.Thread(target=self._run, name="whet-engine", daemon=True)
        self.ready: Future[Runner] = Future()
        self.generated = 0
        self.prompted = 0
        self.steps = 0

    # ------------------------------------------------------------ from any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End what runs with EngineDown, and the thread. Waits for the step that is under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, sequence: Sequence) -> None:
        def add() -> None:
            self._scheduler.add(sequence)
            self.prompted += sequence.prompt_tokens

        self._order(add)

    def cancel(self, sequence: Sequence) -> None:
        """Free what the sequence holds before the next step."""
        self._order(lambda: self._scheduler.cancel(sequence))

    def call(self, function: Callable[[Runner], Any]) -> Future[Any]:
        """Run `function` between two steps."""
        result: Future[Any] = Future()

        def run() -> None:
            try:
                result.set_result(function(self._runner))
            except Exception as error:
                result.set_exception(error)

        self._order(run)
        return result

    def say(self, to: Callable[[Piece | Exception], None]) -> Callable[[Piece | Exception], None]:
        """What a sequence tells pieces to, so that they reach `to` when the step is over."""
        return lambda piece: self._outbox.append((to, piece))

    def load(self) -> dict[str, float]:
        """How busy it is. Numbers are read as they stand, without waiting for the step."""
        if not self.ready.done() or self.ready.exception() is not None:
            return {}
        table = self._scheduler.table
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "cache_used": 1 - table.free_pages / table.size.pages,
            "prompt_tokens": self.prompted,
            "completion_tokens": self.generated,
            "recomputed_tokens": self._scheduler.recomputed,
            "steps": self.steps,
        }

    def _order(self, order: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    # ------------------------------------------------------------ the thread's own

    def _run(self) -> None:
        try:
            self._runner = Runner(self._folder, self._settings)
            self._scheduler = Scheduler(self._runner.table, self._runner.step_tokens)
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(self._runner)
        while self._take_orders():
            self._step()
            self._hand_over()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            sequence.fail(EngineDown(STOPPED))
        self._hand_over()

    def _take_orders(self) -> bool:
        """Carry out what was posted, after waiting for it if nothing is to be done. False: stop."""
        with self._wake:
            while not (self._orders or self._stopping or self._scheduler.running or self._scheduler.waiting):
                self._wake.wait()
            orders, self._orders = self._orders, deque()
        for order in orders:
            order()
        return not self._stopping

    def _step(self) -> None:
        parts = self._scheduler.plan()
        if not parts:
            return
        try:
            drawn = self._runner.run(parts)
        except Exception as error:  # the thread outlives it: others' answers must not hang
            log.exception("a forward pass failed")
            self._fail(parts, EngineDown(f"the model failed: {type(error).__name__}"))
            return
        self.steps += 1
        self.generated += len(drawn)
        for part, token in drawn:
            sequence = part.sequence
            if token is None:
                self._runner.clear(sequence.row if sequence.row is not None else 0)
                sequence.fail(EngineDown("the model has no number for any token that may come next"))
                continue
            try:
                sequence.add(token)
            except Exception as error:
                log.exception("an answer failed")
                sequence.fail(EngineDown(f"the answer failed: {type(error).__name__}"))
        self._scheduler.drop_finished()

    def _fail(self, parts: list[Part], error: EngineDown) -> None:
        for part in parts:
            part.sequence.fail(error)
        self._scheduler.drop_finished()

    def _hand_over(self) -> None:
        if self._outbox:
            pieces, self._outbox = self._outbox, []
            self._deliver(pieces)
