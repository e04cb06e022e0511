"""One request's two channels, watched: how far its answer is, and whether somebody is still there to read it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from whet.serve.access_log import Record

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Send

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""On every answer; the chat page brings a content-security-policy of its own."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Exchange:
    """status: 0 until the answer has begun. patience: seconds in which a client must take what is sent."""

    def __init__(self, record: Record, receive: Receive, send: Send, patience: float):
        self.record, self._receive, self._send, self._patience = record, receive, send, patience
        self.status = 0
        self.complete = False
        self.headers: dict[str, str] = {**HEADERS, "x-request-id": record.id}

    async def send(self, message: Message) -> None:
        """Raises ClientGone where the client takes nothing: a slow reader must not hold a place for ever."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = list(message.get("headers", []))
            names = {name.lower() for name, _ in given}
            ours = [(name.encode(), value.encode()) for name, value in self.headers.items()]
            message = {**message, "headers": [*given, *((name, value) for name, value in ours if name not in names)]}
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except (TimeoutError, OSError):
            raise ClientGone from None
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True

    async def body(self, limit: int) -> bytes | None:
        """The request's body; None where it is longer. Raises ClientGone."""
        parts, length = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            length += len(parts[-1])
            if length > limit:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)

    async def gone(self) -> None:
        """Returns when the client has gone, or its answer is out."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @staticmethod
    def replaying(body: bytes) -> Receive:
        """The body once more, for the application; after it nothing, since `gone` watches what comes."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        return receive
