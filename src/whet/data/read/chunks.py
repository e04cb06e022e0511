"""Sources cut into chunks, so that many processes can read them and results can be kept by content.

    chunks(source, base)  ->  [Chunk, ...]     reads everything, see cuts.py
    read_chunk(chunk)     ->  rows             in any process, on any machine that sees the same files

Small pieces share a chunk, and large ones are cut (cuts.py). Cuts depend on the content and `target_bytes` alone, and
all chunks in order give exactly the rows, line numbers and faults of `read_rows`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from whet.data.faults import raise_at_once
from whet.data.read.cuts import Cut, RowsDigest, cuts, stamp_of
from whet.data.read.piece import Piece, Row
from whet.data.read.rows import Origin, pieces, read_piece
from whet.errors import WhetError

READING = 1
"""Raised when readers give other rows for the same bytes than before, so that no result of the old ones is taken."""

TARGET = 32 << 20
"""Bytes. Chunks of compressed files hold some times as many, see cuts.py."""


@dataclass(frozen=True)
class Chunk:
    """Plain values: pickled, or as JSON through `to_json`.

    key:    SHA-256, in hex, of all that decides what `read_chunk` gives: the bytes, the names and first lines of the
            pieces, the query. Chunks with equal keys have equal rows, wherever and whenever they are read.
    stamps: (size, time of change in ns) of each file when it was hashed; () where a piece is no single file.
    """

    key: str
    pieces: tuple[Piece, ...]
    stamps: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Holds a database's url as it was given. Don't write that to a disk."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Chunk:
        made = tuple(Piece(**{**piece, "paths": tuple(piece["paths"])}) for piece in values["pieces"])
        return cls(values["key"], made, tuple(tuple(stamp) for stamp in values["stamps"]))


def chunks(pattern: str | Origin, base: Path, target_bytes: int = TARGET) -> list[Chunk]:
    """The chunks of a source, in the order of `read_rows`. Each piece tells its file's SHA-256 and size.

    A file that cannot be read is a piece too: reading its chunk gives the fault.
    A query that fails, likewise. Raises WhetError when no file matches, or a data set cannot be opened.
    """
    grouped: list[list[Cut]] = []
    size = 0
    for piece in pieces(pattern, base):
        for cut in cuts(piece, target_bytes):
            if not grouped or size + cut.size > target_bytes:
                grouped.append([])
                size = 0
            grouped[-1].append(cut)
            size += cut.size
    return [_chunk(group) for group in grouped]


def read_chunk(chunk: Chunk, on_error: Callable[[WhetError], None] = raise_at_once) -> Iterator[Row]:
    """The rows of a chunk; `on_error` as in `read_rows`.

    Raises WhetError when a file, or a query's answer, is no longer what it was when the chunk was made; rows that came
    before must then be thrown away.
    """
    for piece, stamp in zip(chunk.pieces, chunk.stamps, strict=True):
        _check_unchanged(piece, stamp)
        digest = RowsDigest() if piece.kind == "sql" else None
        for item in read_piece(piece):
            if isinstance(item, WhetError):
                on_error(item)
                continue
            if digest is not None:
                digest.update(item)
            yield item
        _check_unchanged(piece, stamp)
        if digest is not None and digest.sha256 != piece.sha256:
            raise WhetError(
                "the query gives another answer than when it was first asked",
                where=piece.source,
                fix="add ORDER BY over a unique column, and run again when nobody writes to the tables",
            )


def _chunk(group: list[Cut]) -> Chunk:
    seen = [
        (cut.digest, cut.piece.kind, cut.piece.source, cut.piece.line, cut.piece.is_whole, cut.piece.split)
        for cut in group
    ]
    key = hashlib.sha256(json.dumps([READING, seen]).encode("ascii")).hexdigest()
    return Chunk(key, tuple(cut.piece for cut in group), tuple(cut.stamp for cut in group))


def _check_unchanged(piece: Piece, stamp: tuple[int, ...]) -> None:
    if stamp and stamp_of(piece.path) != stamp:
        raise WhetError(
            "the file changed while it was being read", where=piece.source, fix="run again when nothing writes to it"
        )
