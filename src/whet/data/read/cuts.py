"""A source's piece cut into parts, by its kind, each with a digest of what decides its rows.

    JSON lines   at line ends
    CSV, TSV     at record ends; a part's digest covers the header too, which it is read with
    Parquet      by row groups
    data sets    by rows

Other files, and a query's answer, are one part. JSON lines and CSV are cut while they are hashed. That takes two
digests, the file's and the part's, and a look for record ends: 0.5 GB/s a core (0.3 where every fifth byte is a quote,
0.1 where a parser has to tell what quotes do).

Compressed JSON lines and CSV are cut by positions in what is decompressed, which is never written to a disk. One can
only begin to decompress at the file's start. So part i of n decompresses i parts, and all together (n + 1) / 2 times
the file, besides once for the cuts. Parts are `COMPRESSED_PARTS` times as large for that. 10 GB, decompressed, are 38
parts of 256 MiB, which decompress 195 GB: 14 minutes of one core for gzip (0.23 GB/s), 4 for Zstandard (0.8 GB/s). Ten
times the size takes a hundred times as long, so an export that large is better written as many files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from whet.data.read.hub import open_data_set
from whet.data.read.piece import BYTE_ORDER_MARK, COMPRESSED, Piece, Row, opened
from whet.data.read.record_ends import records_of
from whet.data.read.rows import read_piece
from whet.errors import WhetError

COMPRESSED_PARTS = 8
RATIO = 32
"""What compression makes most text smaller by, at most. A file too small to be cut even so isn't decompressed here."""

OF_RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv")
COMPRESSED_RECORDS = tuple(kind + ending for kind in OF_RECORDS for ending in COMPRESSED)


@dataclass(frozen=True)
class Cut:
    """A piece with the digest of its own bytes, how many they are, and its file's (size, time of change in ns)."""

    piece: Piece
    digest: str
    size: int
    stamp: tuple[int, ...] = ()


def cuts(piece: Piece, target: int) -> Iterator[Cut]:
    """Parts of about `target` bytes, in order; the piece itself where it has no more, or cannot be opened."""
    if piece.kind == "sql":
        return iter([_read_once(piece)])
    if piece.kind in ("dataset", "hub"):
        return _data_set_parts(piece, target)
    try:
        return iter(_file_parts(piece, target))
    except OSError:  # reading the piece says what is wrong
        unread = hashlib.sha256(b"unread").hexdigest()
        return iter([Cut(piece, unread, 0)])


def stamp_of(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


def _file_parts(piece: Piece, target: int) -> list[Cut]:
    stamp, size = stamp_of(piece.path), piece.path.stat().st_size
    parts: list[Cut] = []
    if piece.kind in OF_RECORDS and size > target:
        digest = hashlib.sha256()
        parts = _record_parts(piece, target, digest.update)
        piece = replace(piece, sha256=digest.hexdigest(), bytes=size)
    else:
        piece = replace(piece, sha256=_file_digest(piece.path), bytes=size)
        if piece.kind == ".parquet" and size > target:
            parts = _row_groups(piece, target)
        elif piece.kind in COMPRESSED_RECORDS and size * RATIO > target * COMPRESSED_PARTS:
            parts = _record_parts(piece, target * COMPRESSED_PARTS)
    if len(parts) < 2:
        parts = [Cut(piece, piece.sha256 or "", size)]
    return [replace(cut, piece=replace(cut.piece, sha256=piece.sha256, bytes=size), stamp=stamp) for cut in parts]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_parts(piece: Piece, target: int, note: Callable[[bytes], None] = lambda block: None) -> list[Cut]:
    """JSON lines, CSV: parts of at least `target` bytes but for the last, each ending where a record does.

    note: gets all bytes, in order.
    """
    parts: list[Cut] = []
    start, line = 0, 1
    try:
        with opened(piece) as file:
            records = records_of(file, piece)
            while True:
                digest = hashlib.sha256(records.header if start else b"")
                size = count = 0
                for block in records.take(max(target, len(BYTE_ORDER_MARK))):
                    note(block)
                    digest.update(block)
                    size += len(block)
                    count += _line_feeds(block)
                if not size:
                    break
                part = replace(piece, start=start, stop=start + size, line=line)
                parts.append(Cut(part, digest.hexdigest(), size))
                start, line = start + size, line + count
    except WhetError:  # damaged compression: how many bytes come before it is the reader's to find
        return [*parts, Cut(replace(piece, start=start, line=line), piece.sha256 or "", target)]
    return parts if records.has_rows else []  # that a file has no rows shows only where it is read whole


def _line_feeds(block: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n")))  # twice as fast as bytes.count


def _row_groups(piece: Piece, target: int) -> list[Cut]:
    """Parquet: row groups of together about `target` bytes, uncompressed. None where they cannot be told."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(piece.path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
            names = file.schema_arrow.names
    except (pa.ArrowException, OSError):
        return []
    if len(set(names)) < len(names) or not any(rows for rows, _ in sizes):
        return []
    parts: list[Cut] = []
    start, line, rows, size = 0, 1, 0, 0
    for index, (group_rows, group_size) in enumerate(sizes, start=1):
        rows, size = rows + group_rows, size + group_size
        if size >= target or index == len(sizes):
            part = replace(piece, start=start, stop=index, line=line)
            parts.append(Cut(part, f"{piece.sha256} {start}:{index}", size))
            start, line, rows, size = index, line + rows, 0, 0
    return parts


def _data_set_parts(piece: Piece, target: int) -> Iterator[Cut]:
    data = open_data_set(piece)
    if not data.cache_files:  # held in memory: empty, or small
        yield _read_once(piece)
        return
    digest, size = hashlib.sha256(), 0
    for entry in data.cache_files:
        path = Path(entry["filename"])
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
        size += path.stat().st_size
    piece = replace(piece, sha256=digest.hexdigest(), bytes=size)
    step = max(1, len(data) * target // size) if size > target else len(data)
    if step >= len(data):
        yield Cut(piece, digest.hexdigest(), size)
        return
    for start in range(0, len(data), step):
        stop = min(start + step, len(data))
        part = replace(piece, start=start, stop=stop, line=start + 1)
        yield Cut(part, f"{digest.hexdigest()} {start}:{stop}", size * (stop - start) // len(data))


# ---------------------------------------------------------------- queries


class RowsDigest:
    """SHA-256 of rows, one by one."""

    def __init__(self) -> None:
        self._digest, self.bytes = hashlib.sha256(), 0

    def update(self, row: Row) -> None:
        line = json.dumps([row.line, row.values], separators=(",", ":"), default=repr).encode("ascii") + b"\n"
        self._digest.update(line)
        self.bytes += len(line)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _read_once(piece: Piece) -> Cut:
    """A piece whose content is its rows: a query is asked here for their digest, and again in `read_chunk`."""
    digest = RowsDigest()
    for item in read_piece(piece):
        if isinstance(item, Row):
            digest.update(item)
    return Cut(replace(piece, sha256=digest.sha256, bytes=digest.bytes), digest.sha256, digest.bytes)
