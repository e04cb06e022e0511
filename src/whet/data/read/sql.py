"""The rows of a query, streamed: PostgreSQL, SQLite and DuckDB databases, and files as the table `source`.

    url   postgresql://...                   psycopg, with a cursor on the server (postgres.py)
    path  an SQLite database                 the standard library's sqlite3
    path  a DuckDB database                  duckdb
    path  .parquet .csv .tsv .jsonl ...      duckdb; all files that match are one table

DuckDB could read SQLite and PostgreSQL itself, through extensions that it downloads when first used. whet loads no code
from the network, and Python packages of the extensions are not made for every DuckDB, so each database has its driver.

The query can only read: databases are opened read-only, and of statements one SELECT is accepted. It sees the source
and nothing else of the machine. One thread and UTC, so that one query gives one answer on any machine; the order of
rows is the query's to settle, by ORDER BY.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from whet.data.read.paths import kind_of
from whet.data.read.piece import Piece, Row, column_names
from whet.data.read.postgres import read_postgres
from whet.errors import WhetError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BATCH = 1000  # rows fetched at a time

_TABLE_FUNCTIONS = {
    ".parquet": "read_parquet({files}, union_by_name = true)",
    ".csv": "read_csv({files}, header = true, delim = ',', all_varchar = true, union_by_name = true)",
    ".tsv": "read_csv({files}, header = true, delim = '\t', all_varchar = true, union_by_name = true)",
    ".json": "read_json({files}, union_by_name = true)",
    ".jsonl": "read_ndjson({files}, union_by_name = true)",
    ".ndjson": "read_ndjson({files}, union_by_name = true)",
}


def read_sql(piece: Piece) -> Iterator[Row | WhetError]:
    """The answer's rows. Raises WhetError for a query that fails, with the database's message."""
    if piece.url is not None:
        return read_postgres(piece)
    if len(piece.paths) > 1 or kind_of(piece.paths[0]).removesuffix(".gz").removesuffix(".zst") in _TABLE_FUNCTIONS:
        return _read_duckdb(piece, is_database=False)
    start = _first_bytes(piece.path)
    if start.startswith(b"SQLite format 3\0"):
        return _read_sqlite(piece)
    if start[8:12] == b"DUCK":
        return _read_duckdb(piece, is_database=True)
    raise WhetError(
        "the file is empty" if not start else "neither a database (SQLite, DuckDB) nor a table that a query can read",
        where=piece.source,
        fix=f"name a database, or files of one of {', '.join(_TABLE_FUNCTIONS)}",
    )


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


# ---------------------------------------------------------------- SQLite

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def _read_sqlite(piece: Piece) -> Iterator[Row | WhetError]:
    undecoded = False

    def text(raw: bytes) -> str:
        nonlocal undecoded
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            undecoded = True
            return ""

    # immutable where there is no log: SQLite would have to make one, in a folder that may not allow it.
    logged = any(os.path.exists(piece.paths[0] + ending) for ending in ("-wal", "-journal"))
    address = f"file:{quote(piece.paths[0])}?mode=ro{'' if logged else '&immutable=1'}"
    number = 0
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            connection.text_factory = text
            connection.set_authorizer(_only_reading)
            cursor = connection.execute(piece.sql or "")
            names = _names(cursor.description, piece)
            while True:
                undecoded = False
                values = cursor.fetchone()
                if values is None:
                    return
                number += 1
                if undecoded:
                    yield _not_utf8(piece, number)
                else:
                    yield Row(dict(zip(names, values, strict=True)), piece.source, number)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise _failed(str(error), piece, number) from error


def _only_reading(action: int, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY


def _not_utf8(piece: Piece, number: int) -> WhetError:
    return WhetError(
        "text that is not UTF-8",
        where=f"{piece.source}:{number}",
        fix="select hex(column) to see it; mend or leave it out",
    )


# ---------------------------------------------------------------- DuckDB


def _read_duckdb(piece: Piece, *, is_database: bool) -> Iterator[Row | WhetError]:
    import duckdb

    number = 0
    try:
        with closing(_locked_in(piece, is_database=is_database)) as connection:
            statements = connection.extract_statements(piece.sql or "")
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise _failed("a query is one SELECT", piece, 0)
            answer = connection.execute(statements[0])
            names = _names(answer.description, piece)
            while rows := answer.fetchmany(BATCH):
                for values in rows:
                    number += 1
                    yield Row(dict(zip(names, values, strict=True)), piece.source, number)
    except duckdb.Error as error:
        raise _failed(_message(error, piece), piece, number) from error


def _message(error: Exception, piece: Piece) -> str:
    """The first line, as further ones may show a line of a file; without quoted values, but the query's own words."""
    import duckdb

    first = str(error).partition("\n")[0]
    if isinstance(error, duckdb.ParserException | duckdb.BinderException | duckdb.CatalogException):
        return first
    return re.sub(r"(['\"])(.*?)\1", lambda quoted: quoted[0] if quoted[2] in piece.paths else "…", first)


def _locked_in(piece: Piece, *, is_database: bool) -> DuckDBPyConnection:
    """A connection that reads the piece's files and cannot reach any other, the network, or Python's variables."""
    import duckdb

    connection = duckdb.connect(
        piece.paths[0] if is_database else ":memory:",
        read_only=is_database,
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",
            "threads": "1",
            "temp_directory": "",  # what doesn't fit into memory is an error: nothing private is spilled to disk
        },
    )
    try:
        connection.execute("SET TimeZone = 'UTC'")
        if not is_database:
            files = f"[{', '.join(_literal(path) for path in piece.paths)}]"
            connection.execute(f"SET allowed_paths = {files}")
            connection.execute("SET enable_external_access = false")
            connection.execute(f"CREATE TEMP VIEW source AS SELECT * FROM {_table_function(piece).format(files=files)}")
        else:
            connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
    except duckdb.Error:
        connection.close()
        raise
    return connection


def _table_function(piece: Piece) -> str:
    kinds = {kind_of(path).removesuffix(".gz").removesuffix(".zst") for path in piece.paths}
    if len(kinds) > 1 or (kind := kinds.pop()) not in _TABLE_FUNCTIONS:
        raise WhetError(
            "a query reads files of one kind, and these are of several" if kinds else "a query cannot read this kind",
            where=piece.source,
            fix=f"narrow the path to one of {', '.join(_TABLE_FUNCTIONS)}",
        )
    return _TABLE_FUNCTIONS[kind]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# ---------------------------------------------------------------- both


def _names(description: Any, piece: Piece) -> list[str]:
    """The answer's columns. Raises WhetError where there is none, or one appears twice."""
    if not description:
        raise _failed("a query is one SELECT", piece, 0)
    return column_names([column[0] for column in description], piece.source, "name one of them with AS")


def _failed(message: str, piece: Piece, rows: int) -> WhetError:
    """rows: how many had been read."""
    place = f"after {rows} rows" if rows else "the query fails"
    return WhetError(
        f"{place}: {message.strip()}", where=piece.source, fix="correct the query; it may only read from the source"
    )
