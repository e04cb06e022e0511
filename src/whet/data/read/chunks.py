"""Sources cut into chunks, so that many processes can read them and results can be kept by content.

    chunks(source, base)  ->  [Chunk, ...]     reads everything once, at the speed of SHA-256 (1.5 GB/s a core)
    read_chunk(chunk)     ->  rows             in any process, on any machine that sees the same files

JSON lines are cut at line ends, Parquet by row groups, saved data sets by rows; other files, and a query's answer, are
one piece each. Small pieces share a chunk. Cuts depend on the content and `target_bytes` alone, and all chunks in order
give exactly the rows, line numbers and faults of `read_rows`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from whet.data.faults import raise_at_once
from whet.data.read.hub import open_data_set
from whet.data.read.piece import BYTE_ORDER_MARK, Piece, Row
from whet.data.read.rows import Origin, pieces, read_piece
from whet.errors import WhetError

READING = 1
"""Raised when readers give other rows for the same bytes than before, so that no result of the old ones is taken."""

TARGET = 32 << 20  # bytes
_BLOCK = 1 << 20


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


@dataclass(frozen=True)
class _Cut:
    """A piece with the digest of its own bytes, how many they are, and its file's stamp."""

    piece: Piece
    digest: str
    size: int
    stamp: tuple[int, ...] = ()


def chunks(pattern: str | Origin, base: Path, target_bytes: int = TARGET) -> list[Chunk]:
    """The chunks of a source, in the order of `read_rows`. Each piece tells its file's SHA-256 and size.

    A file that cannot be read is a piece too: reading its chunk gives the fault.
    A query that fails, likewise. Raises WhetError when no file matches, or a data set cannot be opened.
    """
    grouped: list[list[_Cut]] = []
    size = 0
    for piece in pieces(pattern, base):
        for cut in _cuts(piece, target_bytes):
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
        digest = _RowsDigest() if piece.kind == "sql" else None
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


def _chunk(group: list[_Cut]) -> Chunk:
    seen = [
        (cut.digest, cut.piece.kind, cut.piece.source, cut.piece.line, cut.piece.is_whole, cut.piece.split)
        for cut in group
    ]
    key = hashlib.sha256(json.dumps([READING, seen]).encode("ascii")).hexdigest()
    return Chunk(key, tuple(cut.piece for cut in group), tuple(cut.stamp for cut in group))


def _check_unchanged(piece: Piece, stamp: tuple[int, ...]) -> None:
    if stamp and _stamp(piece.path) != stamp:
        raise WhetError(
            "the file changed while it was being read", where=piece.source, fix="run again when nothing writes to it"
        )


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_size, status.st_mtime_ns


# ---------------------------------------------------------------- cuts, by kind


def _cuts(piece: Piece, target: int) -> Iterator[_Cut]:
    if piece.kind == "sql":
        return iter([_read_once(piece)])
    if piece.kind in ("dataset", "hub"):
        return _data_set_parts(piece, target)
    try:
        return iter(_file_parts(piece, target))
    except OSError:  # reading the piece says what is wrong
        unread = hashlib.sha256(b"unread").hexdigest()
        return iter([_Cut(piece, unread, 0)])


def _file_parts(piece: Piece, target: int) -> list[_Cut]:
    stamp = _stamp(piece.path)
    if piece.kind in (".jsonl", ".ndjson") and piece.path.stat().st_size > target:
        return [replace(cut, stamp=stamp) for cut in _line_parts(piece, target)]
    with piece.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    piece = replace(piece, sha256=digest, bytes=piece.path.stat().st_size)
    whole = _Cut(piece, digest, piece.bytes or 0, stamp)
    if piece.kind == ".parquet" and whole.size > target:
        return _row_groups(whole, target)
    return [whole]


def _line_parts(piece: Piece, target: int) -> list[_Cut]:
    """JSON lines: parts of at least `target` bytes (but for the last), each ending at a line's end."""
    whole = hashlib.sha256()
    parts: list[_Cut] = []
    start, line, some_row = 0, 1, False
    with piece.path.open("rb") as file:
        while True:
            digest = hashlib.sha256()
            size = count = 0
            for block in _whole_lines(file, max(target, len(BYTE_ORDER_MARK))):
                digest.update(block)
                whole.update(block)
                size += len(block)
                count += block.count(b"\n")
                some_row = some_row or bool(block.removeprefix(BYTE_ORDER_MARK).strip())
            if not size:
                break
            part = replace(piece, start=start, stop=start + size, line=line)
            parts.append(_Cut(part, digest.hexdigest(), size))
            start, line = start + size, line + count
    sha256 = whole.hexdigest()
    if len(parts) < 2 or not some_row:  # that a file has no rows shows only where it is read whole
        return [_Cut(replace(piece, sha256=sha256, bytes=start), sha256, start)]
    return [replace(cut, piece=replace(cut.piece, sha256=sha256, bytes=start)) for cut in parts]


def _whole_lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """At least `size` bytes, if there are as many, and what is left of the last line."""
    block = b""
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        size -= len(block)
        yield block
    while block and not block.endswith(b"\n") and (block := file.readline(_BLOCK)):
        yield block


def _row_groups(whole: _Cut, target: int) -> list[_Cut]:
    """Parquet: row groups of together about `target` bytes, uncompressed. The whole file where they cannot be told."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(whole.piece.path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
            names = file.schema_arrow.names
    except (pa.ArrowException, OSError):
        return [whole]
    if len(set(names)) < len(names) or not any(rows for rows, _ in sizes):
        return [whole]
    parts: list[_Cut] = []
    start, line, rows, size = 0, 1, 0, 0
    for index, (group_rows, group_size) in enumerate(sizes, start=1):
        rows, size = rows + group_rows, size + group_size
        if size >= target or index == len(sizes):
            part = replace(whole.piece, start=start, stop=index, line=line)
            parts.append(replace(whole, piece=part, digest=f"{whole.digest} {start}:{index}", size=size))
            start, line, rows, size = index, line + rows, 0, 0
    return parts if len(parts) > 1 else [whole]


def _data_set_parts(piece: Piece, target: int) -> Iterator[_Cut]:
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
        yield _Cut(piece, digest.hexdigest(), size)
        return
    for start in range(0, len(data), step):
        stop = min(start + step, len(data))
        part = replace(piece, start=start, stop=stop, line=start + 1)
        yield _Cut(part, f"{digest.hexdigest()} {start}:{stop}", size * (stop - start) // len(data))


# ---------------------------------------------------------------- queries


class _RowsDigest:
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


def _read_once(piece: Piece) -> _Cut:
    """A piece whose content is its rows: a query is asked here for their digest, and again in `read_chunk`."""
    digest = _RowsDigest()
    for item in read_piece(piece):
        if isinstance(item, Row):
            digest.update(item)
    return _Cut(replace(piece, sha256=digest.sha256, bytes=digest.bytes), digest.sha256, digest.bytes)
