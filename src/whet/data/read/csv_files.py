"""CSV and TSV: header in the first line, RFC 4180 quoting, every value a string."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from whet.data.read.piece import Piece, Row, column_names, decoded, lines, opened, raised
from whet.errors import WhetError


def read_csv(piece: Piece) -> Iterator[Row | WhetError]:
    with opened(piece) as file:
        yield from _records(file, piece)


def _records(file: BinaryIO, piece: Piece) -> Iterator[Row | WhetError]:
    source = piece.source
    undecoded: list[WhetError] = []
    reader = csv.reader(
        _texts(file, piece, undecoded), delimiter="\t" if piece.kind.startswith(".tsv") else ",", strict=True
    )
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            # A quoted field may span lines: a record's line is where it starts.
            line, start = start, reader.line_num + 1
            if undecoded:
                if header is None:
                    raise undecoded[0]
                yield undecoded[0]
                undecoded.clear()
            elif not fields:
                continue
            elif header is None:
                header = column_names(fields, f"{source}:{line}")
            elif len(fields) != len(header):
                yield _ragged(fields, header, f"{source}:{line}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), source, line)
    except csv.Error as error:
        raise _fault(error, f"{source}:{start}") from error


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
