"""The rows of a query to PostgreSQL, through psycopg and a cursor on the server, so that memory stays bounded.

The session and its transaction are read-only, the extended protocol takes one statement, and nothing is committed.
Credentials come from the url, from environment variables named in it as ${NAME}, or from where libpq looks (PGPASSWORD,
~/.pgpass); no message shows them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from whet.data.read.piece import Piece, Row, column_names
from whet.errors import WhetError

if TYPE_CHECKING:
    from psycopg import Connection, Error

BATCH = 1000  # rows fetched at a time
PATIENCE = 30  # seconds to connect, where neither the url nor PGCONNECT_TIMEOUT says
SETTINGS = {
    "default_transaction_read_only": "on",
    "timezone": "UTC",
    "datestyle": "ISO",
    # Without these two a table that is read twice may come in two orders.
    "synchronize_seqscans": "off",
    "max_parallel_workers_per_gather": "0",
}


def read_postgres(piece: Piece) -> Iterator[Row | WhetError]:
    """Raises WhetError when the server cannot be reached, refuses the query, or is lost."""
    psycopg = _driver()
    where = shown_address(piece.url or "")
    parameters = _parameters(piece.url or "")
    number = 0
    try:
        with closing(_connected(parameters)) as connection, connection.cursor(name="whet") as cursor:
            cursor.itersize = BATCH
            cursor.execute(piece.sql or "")
            description = cursor.description or []
            names = column_names([column.name for column in description], where, "name one of them with AS")
            for values in cursor:
                number += 1
                yield Row(dict(zip(names, values, strict=True)), piece.source, number)
    except psycopg.Error as error:
        raise _failed(error, where, number, parameters) from error
    except UnicodeDecodeError as error:
        raise WhetError("text that is not UTF-8", where=f"{where}:{number + 1}", fix="convert the database") from error


def shown_address(url: str) -> str:
    """postgresql://host:port/database. Raises WhetError when it cannot be read."""
    parameters = _parameters(url)
    host = str(parameters.get("host") or parameters.get("hostaddr") or "localhost")
    port = f":{parameters['port']}" if "port" in parameters else ""
    return f"postgresql://{quote(host, safe=',:[]') + port}/{quote(str(parameters.get('dbname', '')))}"


def _parameters(url: str) -> dict[str, Any]:
    """libpq's parameters. Messages of the parser are not passed on: they may quote a part of the password."""
    if not re.match(r"postgres(ql)?://|\$\{\w+\}$", url):
        raise WhetError("not the address of a PostgreSQL database", where="url", fix="write postgresql://host/database")
    psycopg = _driver()
    try:
        parameters: dict[str, Any] = psycopg.conninfo.conninfo_to_dict(_expanded(url))
    except psycopg.Error:
        raise _unreadable() from None
    # Of a password with an @ or / that is not encoded, the rest becomes a part of these, which are shown and looked up.
    if "@" in f"{parameters.get('host', '')}{parameters.get('hostaddr', '')}{parameters.get('dbname', '')}":
        raise _unreadable()
    return parameters


def _unreadable() -> WhetError:
    return WhetError(
        "the address of the database cannot be read",
        where="url",
        fix="write postgresql://user@host:5432/database; in a password @ is %40, / is %2F, : is %3A, % is %25",
    )


def _expanded(url: str) -> str:
    """${NAME} replaced by the environment's value: as it is where it is the whole url, else percent-encoded."""

    def value(found: re.Match[str]) -> str:
        if (text := os.environ.get(found[1])) is None:
            raise WhetError(f"the environment has no {found[1]}", where="url", fix=f"export {found[1]}=...")
        return text if found[0] == url else quote(text, safe="")

    return re.sub(r"\$\{(\w+)\}", value, url)


def _driver() -> Any:
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError as error:
        raise WhetError("reading PostgreSQL needs psycopg", where="url", fix='pip install "whet[postgres]"') from error
    return psycopg


def _connected(parameters: dict[str, Any]) -> Connection[tuple[Any, ...]]:
    options = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
    parameters = parameters | {
        "options": f"{parameters.get('options', '')} {options}".strip(),
        "client_encoding": "UTF8",
        "application_name": "whet",
    }
    if "PGCONNECT_TIMEOUT" not in os.environ:
        parameters.setdefault("connect_timeout", PATIENCE)
    connection: Connection[tuple[Any, ...]] = _driver().connect(**parameters)
    connection.read_only = True
    return connection


def _failed(error: Error, where: str, rows: int, parameters: dict[str, Any]) -> WhetError:
    """rows: how many had been read."""
    state = error.sqlstate or ""
    message = (error.diag.message_primary or str(error)).strip().splitlines()[0]
    if state.startswith("22"):  # data exceptions quote the value: the records' own
        message = re.sub(r'"[^"]*"|\'[^\']*\'', "…", message)
    if password := str(parameters.get("password", "")):
        message = message.replace(password, "***")
    place = f"after {rows} rows: " if rows else ""
    if state.startswith(("08", "57P")) or (not state and rows):
        return WhetError(
            f"{place}the connection was lost: {message}", where=where, fix="run again when the server is up"
        )
    if state.startswith("28") or not state:
        return WhetError(
            f"cannot connect: {message}",
            where=where,
            fix="check host, port, user and password (PGPASSWORD, ~/.pgpass, or ${NAME} in the url)",
        )
    hint = f" ({error.diag.message_hint})" if error.diag.message_hint and state.startswith("42") else ""
    return WhetError(
        f"{place or 'the query fails: '}{message}{hint}",
        where=where,
        fix="correct the query; it may only read" + (", and needs GRANT SELECT" if state == "42501" else ""),
    )
