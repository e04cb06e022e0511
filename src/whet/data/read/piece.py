"""A row, the piece of a source that rows come from, and what all readers share: opening, lines, faults of files.

A reader is a function of a piece. It yields rows, and a `WhetError` in the place of each row that is none; it raises
`WhetError` or `OSError` where the rest of the piece cannot be read.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from whet.errors import WhetError

COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_LINE = 256 << 20
"""Bytes. A longer line is a fault: most likely the file has no lines, and would not fit into memory."""


@dataclass(frozen=True)
class Row:
    """One record as it was read.

    source: the file, relative to the base folder where it lies inside it; a database's address without credentials.
    line:   1-based line; the row's number in a Parquet file, a JSON array, a query's answer or a data set.
    """

    values: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Piece:
    """Rows that are read in one go: a file, a part of one, a query's answer, a data set's split. Plain values only.

    kind:         the reader: an extension as ".jsonl" or ".csv.gz", or "sql", "dataset" (a folder), "hub".
    source:       as in `Row`.
    paths:        files or folder to open, absolute; only a query has several.
    start, stop:  the part that is read: bytes of JSON lines or CSV (decompressed), row groups of Parquet, rows of a
                  data set. None: to the end. Of CSV, the header is read too.
    line:         the number of the part's first line or row.
    url:          of a database, as the user gave it; holds credentials, so it is not shown.
    sha256, bytes: of the whole source; None where it was not looked at yet, see `chunks.py`.
    """

    kind: str
    source: str
    paths: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None
    line: int = 1
    sql: str | None = None
    url: str | None = field(default=None, repr=False)
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    sha256: str | None = None
    bytes: int | None = None

    @property
    def path(self) -> Path:
        return Path(self.paths[0])

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop is None


Reader = Callable[[Piece], Iterator[Row | WhetError]]


def cannot_open(source: str, error: OSError) -> WhetError:
    if isinstance(error, PermissionError):
        return WhetError(
            "no permission to read the file",
            where=source,
            fix=f"chmod u+r {source}; the folders above it need u+rx",
        )
    return WhetError(
        f"cannot read the file: {error.strerror or error}", where=source, fix="check the path and the disk"
    )


@contextmanager
def opened(piece: Piece) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed where its name ends in .gz or .zst. Raises WhetError for damaged compression."""
    ending = piece.path.suffix.lower()
    if ending not in COMPRESSED:
        with piece.path.open("rb") as file:
            yield file
        return
    try:
        with _decompressed(piece.path, ending) as file:
            yield file
    except (EOFError, zlib.error, OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        if isinstance(error, WhetError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise WhetError(
            f"not readable as {ending}: {str(error).splitlines()[0] if str(error) else 'damaged'}",
            where=piece.source,
            fix="compress the file again; it may have been cut short or be of another kind",
        ) from error


def _decompressed(path: Path, ending: str) -> BinaryIO:
    if ending == ".gz":
        return cast(BinaryIO, io.BufferedReader(_Forwards(gzip.open(path))))
    import pyarrow as pa  # type: ignore[import-untyped]

    return cast(BinaryIO, io.BufferedReader(_Forwards(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))))


class _Forwards(io.RawIOBase):
    """What a decompressor gives; seeking forwards decompresses what lies between.

    The decompressor is asked for the same number of bytes each time. With damage it gives none of the bytes that it was
    asked for last, so rows before the damage would depend on who reads, and from where.
    """

    STEP = 8192  # bytes

    def __init__(self, stream: Any):
        self._stream, self._rest, self._position = stream, b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        rest = self._rest or self._stream.read1(self.STEP)
        size = min(len(buffer), len(rest))
        buffer[:size], self._rest = rest[:size], rest[size:]
        self._position += size
        return size

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or position < self._position:
            raise io.UnsupportedOperation("seeks forwards from the start only")
        skipped = bytearray(self.STEP)
        while self._position < position and self.readinto(memoryview(skipped)[: position - self._position]):
            pass
        return self._position

    def close(self) -> None:
        self._stream.close()
        super().close()


def lines(file: BinaryIO, piece: Piece) -> Iterator[tuple[int, bytes | WhetError]]:
    """(number, the line with its end, or what is wrong with it) of each line in the piece's bytes.

    Lines end at \\n alone: U+2028 and the like belong to the text. A byte-order mark before the first is left out.
    """
    if piece.start:
        file.seek(piece.start)
    position, number = piece.start, piece.line
    while (piece.stop is None or position < piece.stop) and (raw := file.readline(LONGEST_LINE)):
        position += len(raw)
        if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
            position += _skip_line(file)
            yield number, _too_long(piece.source, number)
        else:
            yield number, raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
        number += 1


def decoded(raw: bytes, piece: Piece, number: int) -> str:
    """A line's text. Raises WhetError where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WhetError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
            where=f"{piece.source}:{number}",
            fix=f"convert the file, as: iconv -f WINDOWS-1252 -t UTF-8 {piece.source} > utf8{piece.kind}",
        ) from error


def whole_text(piece: Piece) -> str:
    """All of a file's text. Raises WhetError at the first line that is not UTF-8."""
    with opened(piece) as file:
        return "".join(decoded(raised(raw), piece, number) for number, raw in lines(file, piece))


def raised(line: bytes | WhetError) -> bytes:
    if isinstance(line, WhetError):
        raise line
    return line


def _skip_line(file: BinaryIO) -> int:
    """Bytes up to the next line."""
    skipped = 0
    while rest := file.readline(1 << 20):
        skipped += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped


def _too_long(source: str, number: int) -> WhetError:
    return WhetError(
        f"a line of more than {LONGEST_LINE >> 20} MiB",
        where=f"{source}:{number}",
        fix="end every record with a line feed, or cut the document into parts",
    )


def column_names(names: list[str], where: str, fix: str = "give every column its own name") -> list[str]:
    """The names, each one once. Raises WhetError otherwise."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WhetError(f"column {twice[0]!r} appears twice", where=where, fix=fix)
    return names
