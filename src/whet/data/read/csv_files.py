"""CSV and TSV: header in the first record, RFC 4180 quoting, every value a string."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, NamedTuple

from whet.data.read.piece import Piece, Row, column_names, decoded, lines, opened, raised
from whet.errors import WhetError


class Record(NamedTuple):
    """line: the one it starts on. fields: none of an empty line. undecoded: of its first line that is not UTF-8."""

    line: int
    fields: list[str]
    undecoded: WhetError | None


def delimiter(piece: Piece) -> str:
    return "\t" if piece.kind.startswith(".tsv") else ","


def read_csv(piece: Piece) -> Iterator[Row | WhetError]:
    with opened(piece) as file:
        found = records(file, replace(piece, start=0, line=1))
        header = next(filter(None, (header_of(record, piece) for record in found)), None)
        if header is None:
            return
        for line, fields, undecoded in records(file, piece) if piece.start else found:
            if undecoded is not None:
                yield undecoded
            elif len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), piece.source, line)
            elif fields:
                yield _ragged(fields, header, f"{piece.source}:{line}")


def header_of(record: Record, piece: Piece) -> list[str] | None:
    """The columns' names; None of an empty line. Raises WhetError where they are no header."""
    if record.undecoded is not None:
        raise record.undecoded
    return column_names(record.fields, f"{piece.source}:{record.line}") if record.fields else None


def records(file: BinaryIO, piece: Piece) -> Iterator[Record]:
    """The records in the piece's bytes. No line is read ahead. Raises WhetError where it is no CSV any more."""
    undecoded: list[WhetError] = []
    reader = csv.reader(_texts(file, piece, undecoded), delimiter=delimiter(piece), strict=True)
    line = piece.line
    try:
        for fields in reader:
            yield Record(line, fields, undecoded[0] if undecoded else None)
            undecoded.clear()
            line = piece.line + reader.line_num  # a quoted field may span lines
    except csv.Error as error:
        raise _fault(error, f"{piece.source}:{line}") from error


def _texts(file: BinaryIO, piece: Piece, undecoded: list[WhetError]) -> Iterator[str]:
    """The lines. One that is not UTF-8 keeps its commas and quotes: its fault, in `undecoded`, costs one record."""
    for number, line in lines(file, piece):
        raw = raised(line)
        try:
            yield decoded(raw, piece, number)
        except WhetError as error:
            undecoded.append(error)
            yield raw.decode("utf-8", "replace")


def _ragged(fields: list[str], header: list[str], where: str) -> WhetError:
    return WhetError(
        f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})",
        where=where,
        fix='put "quotes" round fields that hold the delimiter or a line break',
    )


def _fault(error: csv.Error, where: str) -> WhetError:
    if "field larger than field limit" in str(error):
        fix = "store documents this long as JSONL or Parquet"
    elif "new-line character" in str(error):
        fix = "end every line with a line feed; carriage returns alone are found in old files"
    else:
        fix = 'close the quotes of the record that starts here, and write a quote inside a field as ""'
    return WhetError(f"not valid CSV: {error}", where=where, fix=fix)
