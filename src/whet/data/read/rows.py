"""Reads rows out of files, databases and data sets, and remembers where each came from, so that a fault has a place.

    .jsonl .ndjson .json   one JSON object a line, or (.json) one array of objects
    .parquet               any table
    .csv .tsv              header in the first line, RFC 4180 quoting, every value a string
    .txt .md               one document a file, as {"text": ...}
    .html .htm             one page a file, as {"text": Markdown, "title": ...}
    a folder               every file in it and below; a data set that `save_to_disk` wrote
    sql                    a query's answer, from PostgreSQL, SQLite, DuckDB or files
    hub                    a data set of the Hugging Face hub, by name: the one source that goes to the network

Text is UTF-8, with or without a byte-order mark, and may be compressed (.jsonl.gz, .csv.zst). Files are read in the
order of their names, so that the same files give the same rows on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from whet.data.faults import raise_at_once
from whet.data.read.csv_files import read_csv
from whet.data.read.html_files import read_html
from whet.data.read.hub import data_set_piece, hub_piece, is_data_set, read_data_set, read_hub
from whet.data.read.json_files import read_json, read_json_lines
from whet.data.read.parquet_files import read_parquet
from whet.data.read.paths import kind_of, matching_files, unknown_kind
from whet.data.read.piece import COMPRESSED, Piece, Reader, Row, cannot_open, whole_text
from whet.data.read.postgres import shown_address
from whet.data.read.sql import read_sql
from whet.errors import WhetError

__all__ = ["READERS", "Origin", "Row", "pieces", "read_piece", "read_rows"]


@dataclass(frozen=True)
class Origin:
    """Where rows come from: `path` alone, `sql` with `path` or `url`, or `hub`.

    path:   a path, a glob (`**` crosses folders) or a folder, absolute or relative to the base.
    sql:    one SELECT. Files that are no database are its table `source`.
    url:    postgresql://user@host/database; ${NAME} stands for an environment variable. Never shown.
    hub:    owner/name of a Hugging Face data set; `config` and `revision` as there.
    split:  of a data set that has several.
    skip_unreadable: leave out a folder's files of kinds that cannot be read, which are a fault otherwise.
    """

    path: str | None = None
    sql: str | None = None
    url: str | None = field(default=None, repr=False)
    hub: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    skip_unreadable: bool = False


def read_rows(
    pattern: str | Origin, *, base: Path, on_error: Callable[[WhetError], None] = raise_at_once
) -> Iterator[Row]:
    """Yields the rows of an origin, or of every file that matches a pattern (`Origin.path`).

    on_error: called for each fault of a line or file, after which reading goes on; by default the first is raised.
    Raises WhetError when no file matches, or the folder cannot be searched.
    """
    for piece in pieces(pattern, base):
        for item in read_piece(piece):
            if isinstance(item, WhetError):
                on_error(item)
            else:
                yield item


def pieces(pattern: str | Origin, base: Path) -> list[Piece]:
    """A piece for each file, or one for the query or the data set; nothing of them is read yet.

    Raises WhetError when no file matches, the folder cannot be searched, or the origin contradicts itself.
    """
    origin = Origin(pattern) if isinstance(pattern, str) else pattern
    _check(origin)
    if origin.hub is not None:
        return [hub_piece(origin.hub, origin.split, origin.config, origin.revision)]
    if origin.url is not None:
        return [Piece("sql", shown_address(origin.url), sql=origin.sql, url=origin.url)]
    path = str(Path(os.path.expanduser(origin.path))) if origin.path else ""  # without a slash at its end
    if origin.sql is None and is_data_set(base / path):
        return [data_set_piece(base / path, path, origin.split)]
    if origin.split is not None:
        raise WhetError("only a data set has a split, and the path is none", where=path, fix="remove split")
    files = matching_files(path, base, READERS, skip_others=origin.skip_unreadable)
    if origin.sql is not None:
        return [Piece("sql", path, tuple(str(file) for file, _ in files), sql=origin.sql)]
    return [Piece(kind_of(name), name, (str(file),)) for file, name in files]


def read_piece(piece: Piece) -> Iterator[Row | WhetError]:
    """The rows of a piece, and a fault in the place of each that is none; a fault where there is none at all."""
    item: Row | WhetError | None = None
    try:
        for item in _reader_of(piece)(piece):
            yield item
    except WhetError as error:
        item = error
        yield error
    except OSError as error:
        item = cannot_open(piece.source, error)
        yield item
    if item is None and piece.is_whole:
        yield _nothing(piece)


def _check(origin: Origin) -> None:
    """Raises WhetError when the origin's parts do not go together."""
    given = [name for name in ("path", "url", "hub") if getattr(origin, name) is not None]
    if len(given) != 1:
        raise WhetError(
            f"a source has {' and '.join(given) or 'no path'}",
            where="source",
            fix="give one of path, url (with sql), hub",
        )
    if origin.url is not None and origin.sql is None:
        raise WhetError("a url needs a query", where="source", fix="add sql: SELECT ... FROM ...")
    if origin.hub is not None and origin.sql is not None:
        raise WhetError("a data set of the hub takes no query", where="source", fix="remove sql")
    if origin.hub is None and (origin.config or origin.revision):
        raise WhetError("config and revision are for hub alone", where="source", fix="remove them")


def _reader_of(piece: Piece) -> Reader:
    reader = READERS.get(piece.kind) or _OTHER_READERS.get(piece.kind)
    if reader is None:
        raise unknown_kind(piece.source, READERS)
    return reader


def _nothing(piece: Piece) -> WhetError:
    if piece.kind == "sql":
        return WhetError("the query gives no rows", where=piece.source, fix="check its WHERE, or leave the source out")
    if piece.kind in _OTHER_READERS:
        return WhetError("the data set has no rows", where=piece.source, fix="check the split, or leave the source out")
    what = "the file has no rows" if piece.path.stat().st_size else "the file is empty"
    return WhetError(what, where=piece.source, fix="remove it, or leave it out of the pattern")


def _read_text(piece: Piece) -> Iterator[Row | WhetError]:
    text = whole_text(piece)
    if text.strip():
        yield Row({"text": text}, piece.source, 1)


_TEXT_READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": _read_text,
    ".md": _read_text,
    ".html": read_html,
    ".htm": read_html,
}
READERS: dict[str, Reader] = (
    _TEXT_READERS
    | {".parquet": read_parquet}
    | {kind + ending: reader for ending in COMPRESSED for kind, reader in _TEXT_READERS.items()}
)
_OTHER_READERS: dict[str, Reader] = {"sql": read_sql, "dataset": read_data_set, "hub": read_hub}
