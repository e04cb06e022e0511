"""What every request must be, and what every answer says: an ASGI layer around the pages.

A request that is refused never reaches them: a host that is not ours (a name that was pointed at this machine), a
change asked for by a page that is not ours, a body that is too long, too slow, or not JSON.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY = 32 * 1024
"""Bytes of a request's body at most: a comment of the longest, every letter of it escaped."""

PATIENCE = 10.0
"""Seconds in which a body must be there."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Refused(Exception):
    """A request that is turned away. status: of HTTP."""

    def __init__(self, status: int, what: str):
        self.status, self.what = status, what
        super().__init__(what)


class Guard:
    """hosts: what the Host header may say, with the port where it is not the scheme's own."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self.app, self.hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            answer = _with_headers(send)
            try:
                self._check(scope)
                body = await _body(receive)
            except Refused as refused:
                await _refuse(refused, answer)
                return
            await self.app(scope, _replay(body, receive), answer)

    def _check(self, scope: Scope) -> None:
        headers = _headers(scope)
        if headers.get("host", "").lower() not in self.hosts:
            raise Refused(421, "this address is not the study's own")
        if scope["method"] in ("GET", "HEAD"):
            return
        # A browser says where a change comes from; a page elsewhere can neither leave that out nor forge it.
        if urlsplit(headers.get("origin", "")).netloc.lower() not in self.hosts:
            raise Refused(403, "the request comes from another page")
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused(403, "the request comes from another page")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body is to be JSON")


def _headers(scope: Scope) -> MutableMapping[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _body(receive: Receive) -> bytes:
    body = b""
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the connection ended early")
                part: bytes = message.get("body", b"")
                body += part
                if len(body) > BODY:
                    raise Refused(413, "the request is too long")
                if not message.get("more_body", False):
                    return body
    except TimeoutError as error:
        raise Refused(408, "the request took too long") from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message; what comes after it (the client going away) as it comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sent


async def _refuse(refused: Refused, send: Send) -> None:
    body = json.dumps({"error": refused.what}).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of a long body is not waited for
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
