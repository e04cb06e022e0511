"""Where records end, in a stream of JSON lines or CSV, so that it can be cut there.

A line feed ends a record of JSON lines. In CSV it may lie in quotes, and which quotes count depends on all bytes before
it. As RFC 4180 has it, quotes enclose whole fields. If those of a block do, every second one closes, and a line feed
after an even number of them ends a record: numpy checks and finds that. Any other block is parsed by the reader itself,
to which a quote within an unquoted field is text, and which gives up the file at what it cannot parse.
"""

from __future__ import annotations

import csv
import io
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from whet.data.read import piece as limits
from whet.data.read.csv_files import delimiter, header_of, records
from whet.data.read.piece import BYTE_ORDER_MARK, Piece
from whet.errors import WhetError

BLOCK = 1 << 20  # bytes


class Records(Protocol):
    """A stream of records.

    header:   bytes that each part of the stream needs, at its start.
    has_rows: whether a row, or the fault of one, has been taken.
    """

    header: bytes
    has_rows: bool

    def take(self, size: int) -> Iterator[bytes]:
        """The next bytes, up to the first end of a record that is `size` or more away, or all that are left."""
        ...


def records_of(file: BinaryIO, piece: Piece) -> Records:
    """`file`: the piece's bytes, opened at their start."""
    return _CsvRecords(file, piece) if piece.kind.startswith((".csv", ".tsv")) else _Lines(file)


class _Lines:
    header = b""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.has_rows = False

    def take(self, size: int) -> Iterator[bytes]:
        block = b""
        while size > 0 and (block := self._file.read(min(size, BLOCK))):
            size -= len(block)
            yield self._noted(block)
        while block and not block.endswith(b"\n") and (block := self._file.readline(BLOCK)):
            yield self._noted(block)

    def _noted(self, block: bytes) -> bytes:
        self.has_rows = self.has_rows or bool(block.removeprefix(BYTE_ORDER_MARK).strip())
        return block


class _CsvRecords:
    """Holds a block and what is left of the last: from a record's start to the file's position."""

    def __init__(self, file: BinaryIO, piece: Piece):
        self._file, self._piece = file, replace(piece, start=0, stop=None)
        self._data, self._at = b"", 0
        self._ends: _Ends = _ParsedEnds([])
        self._is_csv = True  # as far as it was looked at; there are no ends after what is none
        self.has_rows = False
        self.header = self._header()
        self._untaken_header = self.header

    def take(self, size: int) -> Iterator[bytes]:
        if self._untaken_header:
            size -= len(self._untaken_header)
            yield self._untaken_header
            self._untaken_header = b""
        while size > 0:
            end = self._ends.first(self._at + size)
            if stop := end or self._ends.last:
                size -= stop - self._at
                yield from self._taken(stop)
            if end:
                return
            if not (self._is_csv and self._read_on()):
                yield from self._taken(len(self._data))
                while block := self._file.read(BLOCK):
                    yield block
                return
            self._find_ends()

    def _taken(self, stop: int) -> Iterator[bytes]:
        if stop > self._at:
            block, self._at = self._data[self._at : stop], stop
            self.has_rows = self.has_rows or bool(block.strip(b"\r\n"))
            yield block

    def _read_on(self) -> bool:
        """False at the file's end. Twice as much where no record ended, so that a long one is not searched often."""
        block = self._file.read(max(BLOCK, len(self._data) - self._at))
        self._data, self._at = self._data[self._at :] + block, 0
        self._ends = _ParsedEnds([])
        return bool(block)

    def _header(self) -> bytes:
        """Lines up to the header's end; b"" where there is none, or a fault."""
        while self._is_csv and self._read_on():
            file = io.BytesIO(_whole_lines(self._data))
            try:
                for record in records(file, self._piece):
                    if header_of(record, self._piece):
                        header, self._data = self._data[: file.tell()], self._data[file.tell() :]
                        self._find_ends()
                        return header
            except WhetError:
                self._is_csv = file.tell() == len(file.getvalue())  # else see _parsed
            self._is_csv = self._is_csv and len(self._data) < limits.LONGEST_LINE
        self._is_csv = False
        return b""

    def _find_ends(self) -> None:
        data = _whole_lines(self._data)
        self._is_csv = len(self._data) - len(data) < limits.LONGEST_LINE
        quotes = _enclosing_quotes(data, delimiter(self._piece))
        if quotes is not None and (ends := _QuotedEnds(data, quotes)).are_near(_longest_record()):
            self._ends = ends
        else:
            self._ends, goes_on = _parsed(data, self._piece)
            self._is_csv = self._is_csv and goes_on


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _longest_record() -> int:
    """Bytes. No field and no line of such a record is too long for the reader."""
    return min(csv.field_size_limit(), limits.LONGEST_LINE - 1)


# ---------------------------------------------------------------- the ends in a block of whole lines


class _Ends(Protocol):
    @property
    def last(self) -> int:
        """Position after the last record that ends in the block; 0 where none does."""
        ...

    def first(self, at: int) -> int:
        """The first end at `at` or later; 0 where there is none."""
        ...


@dataclass(frozen=True)
class _ParsedEnds:
    ends: list[int]  # ascending

    @property
    def last(self) -> int:
        return self.ends[-1] if self.ends else 0

    def first(self, at: int) -> int:
        index = bisect_left(self.ends, at)
        return self.ends[index] if index < len(self.ends) else 0


@dataclass(frozen=True)
class _QuotedEnds:
    """quotes [Q]: positions of quotes that open and close fields by turns."""

    data: bytes
    quotes: NDArray[np.int64]

    @property
    def last(self) -> int:
        stop = len(self.data)
        while (newline := self.data.rfind(b"\n", 0, stop)) >= 0:
            before = int(np.searchsorted(self.quotes, newline))
            if before % 2 == 0:
                return newline + 1
            stop = int(self.quotes[before - 1])
        return 0

    def first(self, at: int) -> int:
        while (newline := self.data.find(b"\n", max(at - 1, 0))) >= 0:
            before = int(np.searchsorted(self.quotes, newline))
            if before % 2 == 0:
                return newline + 1
            if before == len(self.quotes):
                break
            at = int(self.quotes[before]) + 1
        return 0

    def are_near(self, distance: int) -> bool:
        """Whether no record is longer than `distance`. Some that are shorter, but no less than half, are missed."""
        step = max(distance // 2, 1)
        last = self.last
        return last > 0 and all(self.first(at + 1) <= at + step for at in range(0, last - step, step))


def _enclosing_quotes(data: bytes, delimiter: str) -> NDArray[np.int64] | None:
    """[Q] int64, positions of the quotes that open and close fields; None where only a parser can tell.

    A quote opens a field after a delimiter or a line feed alone. If no quote stands there, all are text. Or else every
    second one must stand there, or after one that closed (two quotes in quotes are one), and what follows each of the
    others must be a delimiter, a line's end or a quote: then the reader's state at any place is what the number of
    quotes before it says. A carriage return ends a record too, unless it lies in quotes, and what follows it other than
    a line feed is a fault.
    """
    characters = np.frombuffer(data, np.uint8)
    if b"\r" in data and np.any(characters.take(np.flatnonzero(characters == ord("\r")) + 1) != ord("\n")):
        return None
    quotes = np.flatnonzero(characters == ord('"'))
    # The data end in a line feed: it follows the last quote, and index -1, before the first, is a line feed too.
    before, after = characters.take(quotes - 1), characters.take(quotes[1::2] + 1)
    if _are(before[0::2], f'{delimiter}\n"').all() and _are(after, f'{delimiter}\r\n"').all():
        return quotes
    return None if _are(before, f"{delimiter}\n").any() else quotes[:0]


def _are(characters: NDArray[np.uint8], allowed: str) -> NDArray[np.bool_]:
    """Which of the characters are one of the allowed."""
    found = np.zeros(len(characters), np.bool_)
    for character in allowed:
        found |= characters == ord(character)
    return found


def _parsed(data: bytes, piece: Piece) -> tuple[_ParsedEnds, bool]:
    """The ends up to where the data are no CSV, and whether there is no such place. A record may go on after them."""
    file = io.BytesIO(data)
    ends = []
    try:
        for _ in records(file, replace(piece, line=2)):  # 2: a byte-order mark here is text
            ends.append(file.tell())
    except WhetError:
        # At the end of the data it may only be a record that has not ended. If not, more data tell.
        return _ParsedEnds(ends), file.tell() == len(data)
    return _ParsedEnds(ends), True
