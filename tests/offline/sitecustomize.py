"""Refuses every connection that leaves the machine, and notes it in the file that $WHET_CONNECTIONS names.

Python runs this at start wherever its folder is on PYTHONPATH: so in the children that tests start, and their children.
The suite's own process imports it as a module. Sockets of this machine alone (AF_UNIX, loopback) are let through.
"""

from __future__ import annotations

import os
import sys
from typing import Any

AF_UNIX = 1
LOCAL = ("", "localhost", "127.", "::1", "0.0.0.0")
WATCHED = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in WATCHED:
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif int(arguments[0].family) == AF_UNIX:
        return
    else:
        host = arguments[1][0]
    host = host.decode() if isinstance(host, bytes) else str(host or "")
    if host in LOCAL or host.startswith("127."):
        return
    with open(os.environ["WHET_CONNECTIONS"], "a", encoding="utf-8") as file:
        file.write(f"{event} {host}, by {' '.join(getattr(sys, 'argv', []))}\n")
    raise OSError(f"the tests have no network: {event} {host}")


if "WHET_CONNECTIONS" in os.environ:
    sys.addaudithook(_refuse)
