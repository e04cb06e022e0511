"""What an operator may set about a server elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Seconds. connect: for a connection to come up. silence: without a byte while an answer is awaited or read; a
    long queue is silence too. refresh: between two looks at which models are served. probe: for such a look to end."""

    connect: float = 10.0
    silence: float = 300.0
    refresh: float = 15.0
    probe: float = 30.0
