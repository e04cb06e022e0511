"""The ASGI layer that every request passes: what it must be, who sent it, and what is noted of it.

In this order, so that strangers cost little: framing, host and origin; whether the server drains; the key, and what it
may; the limits; only then the body. Whatever happens inside, one line is logged, and a client that goes away, or stops
reading, ends its answer at once: the application's task is cancelled, and with it the engine's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Protocol

from pydantic_core import from_json

from whet.serve.access_log import AccessLog, Record
from whet.serve.auth import Headers, Identity, is_public
from whet.serve.drain import CLOSE, Drain, cut_short
from whet.serve.errors import ApiError, unforeseen
from whet.serve.exchange import ClientGone, Exchange
from whet.serve.limits import Limits, Settings
from whet.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("whet.serve")

ONCE = (b"host", b"content-length", b"transfer-encoding", b"content-type", b"content-encoding", b"origin")
"""Headers of which a second would be read by one machine on the way, and not by the next."""

LEFT = 499
"""Stands in the log, as in nginx's, for a client that went away before there was a status."""


class Identifies(Protocol):
    async def identify(self, headers: Headers) -> Identity: ...


class Gate:
    """hosts: names that the Host header may say, ports aside; empty for any. The parts are the application's own."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        auth: Identifies,
        limits: Limits,
        settings: Settings,
        metrics: Metrics,
        log: AccessLog,
        drain: Drain,
        hosts: Collection[str] = (),
    ):
        self.app, self.auth, self.limits, self.settings = app, auth, limits, settings
        self.metrics, self.log, self.drain, self.hosts = metrics, log, drain, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(scope["method"], scope["path"], keep=self.log.content)
        exchange = Exchange(record, receive, send, self.settings.write_patience)
        with self.metrics.running.track_inprogress():
            try:
                await self._admit(scope, record, exchange)
            except ApiError as refusal:
                await _refuse(exchange, refusal, record)
            except ClientGone:
                record.left = True
            except asyncio.CancelledError:
                record.error = "cut_off"
                raise
            except Exception as error:  # a bug; the client learns nothing of it
                logger.exception("%s %s failed", record.id, record.route)
                record.error = type(error).__name__
                await _refuse(exchange, unforeseen(), record)
            finally:
                self._note(record, exchange)

    def _note(self, record: Record, exchange: Exchange) -> None:
        record.status = exchange.status or (LEFT if record.left else 503)
        if record.account is not None:
            record.account.spend_tokens(record.prompt_tokens + record.completion_tokens)
        self.metrics.ended(record)
        if not is_public(record.path):  # probes come every few seconds, and say nothing
            self.log.write(record)

    async def _admit(self, scope: Scope, record: Record, exchange: Exchange) -> None:
        headers: Headers = scope["headers"]
        self._check(scope["method"], headers, public=is_public(record.path))
        if is_public(record.path):
            await self._run(scope, exchange, b"")
            return
        record.identity = identity = await self.auth.identify(headers)
        identity.check_endpoint(record.path)
        with ExitStack() as held:
            held.enter_context(self.drain.request())
            record.account = held.enter_context(self.limits.admitted(identity.id, identity.allowance))
            exchange.headers |= record.account.headers()
            body = await self._body(scope, exchange) if scope["method"] == "POST" else b""
            await self._run(scope, exchange, body)

    async def _run(self, scope: Scope, exchange: Exchange, body: bytes) -> None:
        """The application, until it is done, the client has gone, or the server has no time left."""
        scope = {**scope, "state": {**scope.get("state", {}), "record": exchange.record}}

        async def answer() -> None:
            await self.app(scope, exchange.replaying(body), exchange.send)

        work = asyncio.create_task(answer())
        watch = asyncio.create_task(exchange.gone())
        cut = asyncio.create_task(self.drain.cut_off.wait())
        try:
            await asyncio.wait((work, watch, cut), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not exchange.complete:
                exchange.record.cut = not watch.done()  # a stream that has begun then tells its reader
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
                if not exchange.complete:
                    raise cut_short() if exchange.record.cut else ClientGone
            else:
                await work  # where the answer is out, what is left is tidying up
        finally:
            for task in (work, watch, cut):
                task.cancel()
            await asyncio.gather(work, watch, cut, return_exceptions=True)

    # ---------------------------------------------------------------- what a request must be

    def _check(self, method: str, headers: Headers, *, public: bool) -> None:
        seen = Counter(name for name, _ in headers)
        values = {name: value.decode("latin-1").strip() for name, value in headers}
        if (double := [name.decode() for name in ONCE if seen[name] > 1]) or (
            seen[b"content-length"] and seen[b"transfer-encoding"]
        ):
            what = f"{double[0]} is given twice" if double else "content-length and transfer-encoding contradict"
            raise ApiError(400, f"Malformed request: {what}.", headers=CLOSE)
        host = _without_port(values.get(b"host", ""))
        if self.hosts and host not in self.hosts:
            raise ApiError(421, "This server does not go by that name.", code="misdirected", headers=CLOSE)
        origin, site = values.get(b"origin"), values.get(b"sec-fetch-site", "none")
        foreign = origin is not None and _without_port(origin.partition("://")[2]) != host
        if foreign or (not public and site not in ("same-origin", "none")):  # links may lead to the chat page
            raise ApiError(403, "Requests of other web pages are not served.", code="cross_origin", headers=CLOSE)
        if method != "POST" and (seen[b"transfer-encoding"] or values.get(b"content-length", "0") != "0"):
            raise ApiError(400, f"{method} has no body.", headers=CLOSE)
        if method == "POST":
            if values.get(b"content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "The body is to be application/json.", code="unsupported_media_type", headers=CLOSE)
            if values.get(b"content-encoding", "identity").lower() != "identity":
                what = "Compressed bodies are not read."
                raise ApiError(415, what, code="unsupported_encoding", headers=CLOSE)

    async def _body(self, scope: Scope, exchange: Exchange) -> bytes:
        """The body, which is JSON. Raises ApiError: 413, 408, or 400 with the place of the fault."""
        limit = self.settings.max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = ApiError(413, f"The body is longer than {limit} bytes.", code="body_too_long", headers=CLOSE)
        if int(length) > limit:
            raise too_long
        try:
            async with asyncio.timeout(self.settings.body_patience):
                body = await exchange.body(limit)
        except TimeoutError:
            raise ApiError(408, "The body took too long.", code="body_too_slow", headers=CLOSE) from None
        if body is None:
            raise too_long
        try:
            # also refuses what Python's own parser lets through: NaN, halves of surrogate pairs, endless nesting
            from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"The body is not valid JSON: {error}.") from None
        return body


async def _refuse(exchange: Exchange, refusal: ApiError, record: Record) -> None:
    """Say so, where nothing has been said yet; an answer that has begun can only end."""
    record.error = record.error or refusal.code or str(refusal.status)
    if exchange.status:
        return
    body = json.dumps(refusal.body(), ensure_ascii=True).encode("ascii")
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    with suppress(ClientGone):
        await exchange.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await exchange.send({"type": "http.response.body", "body": body})


def _without_port(host: str) -> str:
    """A host's name in lower case: of `[::1]:80` the part in brackets."""
    name = host.partition("/")[0].lower()
    return name.partition("]")[0].removeprefix("[") if name.startswith("[") else name.partition(":")[0]
