"""The process: a socket, TLS, signals, and uvicorn between them and the application.

Only this machine can reach the server unless `host` says otherwise, and then it must know who asks, and be asked by TLS
(or behind a proxy that does it).
"""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from whet.addresses import is_loopback
from whet.errors import WhetError
from whet.serve.app import Parts, make_app
from whet.serve.drain import Drain
from whet.serve.interface import Engine

CONNECTIONS = 4096
HEAD_PATIENCE = 15.0
"""Seconds in which a request's head must be there."""
HEAD = 32 * 1024
"""Bytes of a request's head at most."""
CUT = 3
"""Seconds for connections to end once their answers are cut off."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """port 0: any that is free. plain_http: others may ask without TLS, as behind a proxy that does it."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None
    plain_http: bool = False

    def check(self, *, authenticated: bool) -> None:
        """Raises WhetError for an address that would let strangers in, or listen in."""
        if is_loopback(self.host):
            return
        where = f"--host {self.host}"
        if not authenticated:
            fix = "make a key with `whet keys add NAME`, and leave --no-auth out"
            raise WhetError("other machines could ask without a key", where=where, fix=fix)
        if self.certificate is None and not self.plain_http:
            fix = "give --certificate and --key, or --plain-http behind a proxy that does TLS or in a network you trust"
            raise WhetError("keys and prompts would cross the network unencrypted", where=where, fix=fix)

    def names(self, allowed: Collection[str]) -> frozenset[str]:
        """What the Host header may say. On this machine its own names, so that no web page gets in by a name of its
        own that points here (DNS rebinding); elsewhere those that are allowed, or any where none is."""
        own = LOOPBACK if is_loopback(self.host) else (self.host,) if allowed else ()
        return frozenset(name.lower() for name in (*own, *allowed))

    def url(self, port: int) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{name}:{port}"

    def listen(self) -> socket.socket:
        """Raises WhetError where the port is taken, or not for this user."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family, backlog=1024)
        except OSError as error:
            fix = "take another --port, or stop what has it"
            raise WhetError(f"cannot listen: {error}", where=f"{self.host}:{self.port}", fix=fix) from error


class PatientProtocol(H11Protocol):
    """uvicorn's, and the first request's head must come in time: connections that say nothing are not kept."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._waiting = self.loop.call_later(HEAD_PATIENCE, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT lets what runs end; a second one ends it. ended_by: the first one's number."""

    def __init__(self, config: uvicorn.Config, drain: Drain, patience: float):
        super().__init__(config)
        self._drain, self._patience = drain, patience
        self._quiet: asyncio.Task[None] | None = None
        self.listening = asyncio.Event()
        self.ended_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's would raise the signal again at the end, and kill the process before the engine has stopped."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def end(self, number: int) -> None:
        """What a signal does."""
        if self.ended_by is not None:
            self._exit()
            return
        self.ended_by = number
        self._drain.begin()
        self._quiet = asyncio.create_task(self._exit_when_quiet())

    async def _exit_when_quiet(self) -> None:
        await self._drain.quiet(self._patience)
        self._exit()

    def _exit(self) -> None:
        """Answers that still run get CUT seconds to say that they are not whole."""
        self._drain.cut_off.set()
        self.should_exit = True


def serve(
    engine: Engine, parts: Parts, address: Address, *, ready: Callable[[str], None], drain_seconds: float = 30.0
) -> int | None:
    """Serve until a signal ends it, and return its number. ready: told the address, once the models are there.

    Raises WhetError for an address or a certificate that can't be had, and what the engine can't load.
    """
    with address.listen() as listener:
        config = configuration(engine, parts, address)
        url = address.url(listener.getsockname()[1])
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            return runner.run(_serve(engine, parts.drain, config, drain_seconds, listener, lambda: ready(url)))


async def _serve(
    engine: Engine,
    drain: Drain,
    config: uvicorn.Config,
    drain_seconds: float,
    listener: socket.socket,
    ready: Callable[[], None],
) -> int | None:
    """The server answers while the engine still loads: probes learn that it lives, and that it is not ready."""
    server = DrainingServer(config, drain, drain_seconds)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(engine.start())
    try:
        await asyncio.wait((serving, starting), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            drain.ready = True
            await server.listening.wait()
            ready()
        await serving
    finally:
        server.should_exit = True
        starting.cancel()
        await asyncio.gather(serving, starting, return_exceptions=True)
        if drain.ready:
            await engine.stop()
    return server.ended_by


def configuration(engine: Engine, parts: Parts, address: Address) -> uvicorn.Config:
    """uvicorn's settings. Raises WhetError for a certificate or key that can't be used."""
    config = uvicorn.Config(
        make_app(engine, parts),
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEAD,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=CUT,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        fix = "give a certificate and its key, both in PEM"
        raise WhetError(f"TLS cannot start: {error}", where=str(address.certificate), fix=fix) from error
    return config
