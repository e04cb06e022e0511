"""Servers for the engine that asks one elsewhere: they say what a test has written down, well-formed or not."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-of-the-upstream"
CARD = {"id": "base", "object": "model", "created": 1, "owned_by": "vllm", "root": "/models/base", "max_model_len": 512}
ADAPTER = {"id": "tuned", "object": "model", "owned_by": "vllm", "root": "/a", "parent": "base", "max_model_len": None}

Says = Callable[["Talk"], None]


@dataclass
class Talk:
    """One request: what came, and the socket for what goes back."""

    path: str
    headers: dict[str, str]
    body: Any
    send: Callable[[bytes], Any]
    hold: threading.Event

    def whole(self, status: int, content: Any, *headers: str, kind: str = "application/json") -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        head = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(content)}", *headers]
        self.send(("\r\n".join(head) + "\r\n\r\n").encode() + content)

    def begin(self) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def part(self, content: bytes) -> None:
        self.send(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def end(self) -> None:
        self.part(b"")


@dataclass
class Upstream:
    """cards: its models. says: by path, instead of the usual. `asked` holds every request but those for models."""

    url: str = ""
    cards: list[dict[str, Any]] = field(default_factory=lambda: [CARD])
    says: dict[str, Says] = field(default_factory=dict)
    asked: list[Talk] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def answer(self, talk: Talk) -> None:
        if talk.path != "/v1/models":
            self.asked.append(talk)
        if talk.path in self.says:
            self.says[talk.path](talk)
        elif talk.path == "/v1/models":
            talk.whole(200, {"object": "list", "data": self.cards})
        else:
            talk.whole(404, {"detail": "Not Found"})

    def bodies(self, path: str) -> list[Any]:
        return [talk.body for talk in self.asked if talk.path == path]


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def streaming(*events: Any, done: bool = True) -> Says:
    """A whole stream of these events."""

    def say(talk: Talk) -> None:
        talk.begin()
        for data in events:
            talk.part(event(data))
        if done:
            talk.part(event(b"[DONE]"))
        talk.end()

    return say


@contextmanager
def upstream(*, tls: tuple[str, str] | None = None) -> Iterator[Upstream]:
    """tls: files of a certificate and its key."""
    found = Upstream()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            found.answer(Talk(self.path, dict(self.headers), body, self.wfile.write, found.hold))

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    found.url = f"{'https://localhost' if tls else 'http://127.0.0.1'}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.hold.set()
        server.shutdown()
        server.server_close()
