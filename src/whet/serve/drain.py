"""Coming up and going down without dropping anybody.

Until the models are there, and while it drains, the server answers: /ready says 503, so that a load balancer looks
elsewhere, and so does every new request. Draining gives what runs time to end. Answers that are not ready when the time
is over are cut off, and say so; a second signal does that at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from whet.serve.errors import ApiError


class Drain:
    """Where the server is between its start and its end, and how many requests run."""

    def __init__(self) -> None:
        self.ready = False
        self.draining = False
        self.running = 0
        self.cut_off = asyncio.Event()
        """Set when answers that still run are to end now."""
        self._quiet = asyncio.Event()
        self._quiet.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Raises ApiError (503) until the models are there, and once draining has begun."""
        if self.draining:
            raise ApiError(503, "The server is going down.", code="draining", retry_after=5, headers=CLOSE)
        if not self.ready:
            raise ApiError(503, "The models are being loaded.", code="starting", retry_after=5)
        self.running += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self._quiet.set()

    @property
    def state(self) -> str:
        return "draining" if self.draining else "ready" if self.ready else "starting"

    def begin(self) -> None:
        self.draining = True

    async def quiet(self, seconds: float) -> bool:
        """Waits until nothing runs. False: the time was over first."""
        try:
            async with asyncio.timeout(seconds):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True


def cut_short() -> ApiError:
    """What an answer ends with that the server had no time left for."""
    what = "The server is going down, and cut this answer off."
    return ApiError(503, what, code="cut_off", retry_after=5, headers=CLOSE)


CLOSE = {"connection": "close"}
