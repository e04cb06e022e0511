"""A TCP relay that keeps every byte that crosses it, both ways: what somebody on the wire would see."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import Any


class Wiretap(socketserver.ThreadingTCPServer):
    """Listens on a port of its own and relays to `target`, the port of a server on this machine."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: int = 0):
        super().__init__(("127.0.0.1", 0), _Relay)
        self.target, self.heard = target, bytearray()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        self.server_close()


class _Relay(socketserver.BaseRequestHandler):
    server: Wiretap

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.target)) as upstream:
            back = threading.Thread(target=self._pump, args=(upstream, self.request), daemon=True)
            back.start()
            self._pump(self.request, upstream)
            back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.server.heard += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
