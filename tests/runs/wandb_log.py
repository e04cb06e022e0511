"""W&B's offline store, read: its client writes it and has no reader in Python, so the records' frames are read here.

The frames are LevelDB's log format (github.com/google/leveldb, doc/log_format.md) after a header of seven bytes; what
is in them is read by W&B's own protocol.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FRAME, HEADER = 32768, 7, 7


def payloads(data: bytes) -> Iterator[bytes]:
    """The payload of each record, its pieces put together."""
    at, parts = HEADER, b""
    while at + FRAME <= len(data):
        if BLOCK - at % BLOCK < FRAME:  # no frame begins in the last bytes of a block
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + FRAME : at + FRAME + length]
        at += FRAME + length
        if kind in (1, 4):  # whole, or the last piece
            yield parts
            parts = b""


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Kind of record (run, history, summary, exit) -> what each holds: keys with JSON values."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    found: dict[str, list[dict[str, Any]]] = {}
    for payload in payloads(path.read_bytes()):
        record = Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            values = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            values |= {"id": record.run.run_id, "project": record.run.project, "host": record.run.host}
        elif kind in ("history", "summary"):
            items = record.history.item if kind == "history" else record.summary.update
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
        elif kind == "exit":
            values = {"code": record.exit.exit_code}
        else:
            values = {}
        found.setdefault(str(kind), []).append(values)
    return found
