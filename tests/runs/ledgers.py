"""Ledgers for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from whet.runs.ledger import NAME, Ledger

KEY = Ed25519PrivateKey.generate()
OTHER_KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()
EVENTS = 12


def filled(folder: Path, key: Ed25519PrivateKey | None, count: int = EVENTS) -> Path:
    ledger = Ledger(folder / NAME, key)
    for i in range(count):
        facts = {"loss": 1 / (i + 1), "note": "ü" * i}
        ledger.append("trained.done", run=f"run-{i}", inputs={"data": f"{i:064x}"}, outputs={}, facts=facts)
    return folder / NAME
