"""A gateway on a real socket, in a thread of its own: clients get what uvicorn makes of it, not a stand-in."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from whet.serve.access_log import AccessLog
from whet.serve.app import Parts
from whet.serve.auth import ALL_ENDPOINTS, Authenticator
from whet.serve.interface import Engine
from whet.serve.keys import KeyRing, new
from whet.serve.server import Address, DrainingServer, configuration

CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
PATIENCE = 20.0


@dataclass
class Gateway:
    """address: host and port. token: a key that may do everything. log: the request log's text."""

    address: tuple[str, int]
    token: str
    parts: Parts
    engine: Any
    server: DrainingServer
    loop: asyncio.AbstractEventLoop
    log: io.StringIO
    client: httpx2.Client
    """Of this address, without a key."""

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def auth(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"}

    def post(self, path: str = "/v1/chat/completions", body: Any = None, **more: Any) -> httpx2.Response:
        headers = self.auth | more.pop("headers", {})
        return self.client.post(path, json=CHAT if body is None else body, headers=headers, **more)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return self.client.get(path, headers=self.auth | headers)

    def raw(self, text: bytes, *, half_close: bool = False) -> bytes:
        """What comes back for these bytes, until the server closes or a second has passed."""
        with socket.create_connection(self.address, timeout=PATIENCE) as client:
            client.sendall(text)
            if half_close:
                client.shutdown(socket.SHUT_WR)
            return _everything(client)

    def request(self, body: bytes, *headers: str, path: str = "/v1/chat/completions", length: bool = True) -> bytes:
        """A POST with a key, as bytes, and exactly these headers besides."""
        head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self.token}"]
        head += ["Content-Type: application/json"] if not any("content-type" in h.lower() for h in headers) else []
        head += [f"Content-Length: {len(body)}"] if length else []
        return ("\r\n".join([*head, *headers]) + "\r\n\r\n").encode("latin-1") + body

    def in_loop(self, do: Callable[[], Any]) -> None:
        self.loop.call_soon_threadsafe(do)

    def wait_until(self, what: Callable[[], bool]) -> None:
        """Fails when it does not come true: nothing here depends on how fast."""
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, "it did not come true"
            time.sleep(0.005)

    def lines(self, count: int) -> list[dict[str, Any]]:
        """The request log, once it has so many lines."""
        self.wait_until(lambda: self.log.getvalue().count("\n") >= count)
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def _everything(client: socket.socket) -> bytes:
    found = b""
    client.settimeout(1.0)
    try:
        while part := client.recv(65536):
            found += part
    except TimeoutError:
        pass
    except ConnectionError:
        pass
    return found


@contextmanager
def gateway(engine: Engine, *, content: bool = False, patience: float = 5.0, **parts: Any) -> Iterator[Gateway]:
    """parts: of `Parts`. Without `auth`, one key that may do everything."""
    key, token = new("tests", endpoints=ALL_ENDPOINTS)
    written = io.StringIO()
    parts.setdefault("auth", Authenticator(KeyRing(only=[key])))
    made = Parts(**parts, log=log_into(written, content=content))
    address = Address(port=0)
    listener = address.listen()
    running: dict[str, Any] = {}
    up = threading.Event()

    async def run() -> None:
        server = DrainingServer(configuration(engine, made, address), made.drain, patience)
        running.update(server=server, loop=asyncio.get_running_loop())
        await engine.start()
        made.drain.ready = True
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listening.wait()
        up.set()
        await serving
        await engine.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert up.wait(PATIENCE), "the gateway did not come up"
    place = listener.getsockname()[:2]
    client = httpx2.Client(base_url=f"http://{place[0]}:{place[1]}", timeout=60, verify=False)
    try:
        with client:
            yield Gateway(place, token, made, engine, running["server"], running["loop"], written, client)
    finally:
        running["server"].should_exit = True
        thread.join(PATIENCE)
        listener.close()


def log_into(written: io.StringIO, *, content: bool = False) -> AccessLog:
    log = AccessLog(content=content)
    log._logger.handlers[:] = [logging.StreamHandler(written)]
    return log


def key_file(folder: Path) -> Path:
    return folder / "keys.json"


def events(text: str) -> list[Any]:
    """The events of a stream, each checked to be one: `data: ` and JSON, or [DONE] at the end."""
    parts = text.split("\n\n")
    assert parts.pop() == "", "the last event is not ended"
    assert all(part.startswith("data: ") and "\n" not in part for part in parts), parts
    return [part[6:] if part == "data: [DONE]" else json.loads(part[6:]) for part in parts]
