"""Rows of queries, of a real PostgreSQL, of SQLite, DuckDB and table files. A query reads and does nothing else."""

from __future__ import annotations

import datetime
import decimal
import gzip
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.read.postgres import PASSWORD, USER, Server, running_server
from whet.data.read.rows import Origin, Row, read_rows
from whet.errors import WhetError

TICKETS = [{"id": 1, "question": "Où ?", "answer": "Là."}, {"id": 2, "question": "Who?", "answer": None}]


def rows(base: Path, sql: str, **where: str) -> list[Row]:
    return list(read_rows(Origin(sql=sql, **where), base=base))


def fault(base: Path, sql: str, **where: str) -> WhetError:
    with pytest.raises(WhetError) as caught:
        rows(base, sql, **where)
    assert caught.value.fix
    assert PASSWORD not in str(caught.value)
    return caught.value


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        server.admin(f"""
            CREATE TABLE tickets (id int PRIMARY KEY, question text, answer text);
            INSERT INTO tickets VALUES (1, 'Où ?', 'Là.'), (2, 'Who?', NULL);
            CREATE TABLE secret (ssn text);
            INSERT INTO secret VALUES ('536-90-4399');
            CREATE TABLE chats (messages jsonb, tags text[], at timestamptz, price numeric, raw bytea, ok bool);
            INSERT INTO chats VALUES ('[{{"role": "user", "content": "Hi"}}]', '{{a,b}}', '2024-05-06 07:08:09+02',
                                      1.50, '\\x00ff', true);
            GRANT SELECT ON tickets, chats TO {USER};
            GRANT CREATE ON SCHEMA public TO {USER};
        """)
        yield server


# ---------------------------------------------------------------- PostgreSQL


def test_postgres_rows_and_where_they_came_from(tmp_path: Path, server: Server):
    read = rows(tmp_path, "SELECT * FROM tickets ORDER BY id -- 100%s", url=server.url())
    source = f"postgresql://127.0.0.1:{server.port}/postgres"
    assert read == [Row(values, source, i) for i, values in enumerate(TICKETS, start=1)]


def test_postgres_types_become_plain_values(tmp_path: Path, server: Server):
    """Catches JSON that stays text, so that a column of messages is no list; and times in the machine's own zone."""
    (row,) = rows(tmp_path, "SELECT * FROM chats", url=server.url())
    assert row.values == {
        "messages": [{"role": "user", "content": "Hi"}],
        "tags": ["a", "b"],
        "at": datetime.datetime(2024, 5, 6, 5, 8, 9, tzinfo=datetime.UTC),
        "price": decimal.Decimal("1.50"),
        "raw": b"\x00\xff",
        "ok": True,
    }
    assert row.values["at"].utcoffset() == datetime.timedelta(0)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT * FRM tickets", 'syntax error at or near "FRM"'),
        ("SELECT nothing FROM tickets", 'column "nothing" does not exist'),
        ("SELECT * FROM secret", "permission denied"),
        ("SELECT 1 AS a, 2 AS a", "'a' appears twice"),
        ("SELECT id FROM tickets WHERE false", "no rows"),
        ("", "syntax error"),
        ("CREATE TABLE mine (a int)", "syntax error"),
        ("SELECT 1; SELECT 2", "multiple commands"),
        ("SELECT 1; COMMIT; SET default_transaction_read_only = off; CREATE TABLE mine (a int)", "multiple commands"),
        ("WITH made AS (INSERT INTO tickets VALUES (3) RETURNING id) SELECT * FROM made", "WITH"),
    ],
)
def test_postgres_queries_that_fail(tmp_path: Path, server: Server, sql: str, says: str):
    """Catches a query that writes, by any of the ways round a read-only transaction."""
    assert says in fault(tmp_path, sql, url=server.url()).what


def test_nothing_is_committed(tmp_path: Path, server: Server):
    """Catches what PostgreSQL before 16 lets a read-only transaction do: make a large object."""
    allowed = "current_setting('server_version_num')::int < 160000"
    rows(tmp_path, f"SELECT CASE WHEN {allowed} THEN lo_create(4711) END AS id", url=server.url())
    server.admin("DO $$ BEGIN ASSERT (SELECT count(*) FROM pg_largeobject_metadata) = 0; END $$")


def test_values_of_records_stay_out_of_messages(tmp_path: Path, server: Server):
    """Catches `invalid input syntax for type integer: "Jane Roe"` in a log."""
    error = fault(tmp_path, "SELECT question::int FROM tickets", url=server.url())
    assert "invalid input syntax" in error.what
    assert "Où" not in str(error)


def test_postgres_passwords_are_never_shown(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    good = "s3cret%20p%40ss%2Fword%3A%25"
    wrong = fault(tmp_path, "SELECT 1", url=server.url("wr0ng"))
    assert "password authentication failed" in wrong.what
    for url in (
        server.url("wr0ng/raw:p%zz"),
        server.url("wr0ng@"),
        f"postgresql://{USER}:wr0ng@127.0.0.1:port/d",
        f"postgresql://{USER}:12/wr0ng@127.0.0.1/d",
        server.url("wr0ng", database="none"),
        f"postgresql://{USER}:wr0ng@127.0.0.1:{server.port}/postgres?sslmode=wr0ng",
        f"postgresql://{USER}:wr0ng@127.0.0.1:1/postgres",
        "mysql://root:wr0ng@h/d",
    ):
        assert "wr0ng" not in str(fault(tmp_path, "SELECT 1", url=url)), url
    assert good not in repr(Origin(sql="SELECT 1", url=server.url()))
    monkeypatch.setenv("TICKETS_PASSWORD", PASSWORD)
    monkeypatch.setenv("TICKETS_URL", server.url())
    for url in (server.url("${TICKETS_PASSWORD}"), "${TICKETS_URL}"):
        assert rows(tmp_path, "SELECT 1 AS a", url=url)[0].source == f"postgresql://127.0.0.1:{server.port}/postgres"
    assert "no TICKETS_PASS" in fault(tmp_path, "SELECT 1", url=server.url("${TICKETS_PASS}")).what


def test_without_the_driver_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert 'pip install "whet[postgres]"' in (fault(tmp_path, "SELECT 1", url="postgresql://h/d").fix or "")


def test_a_server_that_goes_away(tmp_path: Path, server: Server):
    """Catches a traceback, or a short answer taken for the whole one, when the connection drops half way."""
    read = read_rows(Origin(sql="SELECT generate_series(1, 10000000) AS n", url=server.url()), base=tmp_path)
    assert [next(read).values["n"] for _ in range(1500)] == list(range(1, 1501))
    server.stop()
    try:
        with pytest.raises(WhetError, match=r"after 2000 rows: the connection was lost"):
            list(read)
        assert "cannot connect" in fault(tmp_path, "SELECT 1", url=server.url()).what
    finally:
        server.start()


def test_an_answer_larger_than_memory_streams(tmp_path: Path, server: Server):
    """Catches a cursor on the client's side: 400 MB of rows must pass through a process that may hold 200 MB more."""
    script = """
        import resource, sys
        from pathlib import Path
        from whet.data.read.rows import Origin, read_rows

        sql = "SELECT repeat('x', 4000) || n AS text FROM generate_series(1, 100000) AS n"
        read = read_rows(Origin(sql=sql, url=sys.argv[1]), base=Path("."))
        next(read)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = 1 + sum(1 for _ in read)
        print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script), server.url()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    count, grown_kib = map(int, done.stdout.split())
    assert count == 100_000
    assert grown_kib < 100 << 10


# ---------------------------------------------------------------- SQLite


@pytest.fixture
def sqlite(tmp_path: Path) -> Path:
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute("CREATE TABLE tickets (id INTEGER, question TEXT, answer TEXT)")
        connection.executemany("INSERT INTO tickets VALUES (:id, :question, :answer)", TICKETS)
    connection.close()
    return tmp_path


def test_sqlite_rows(sqlite: Path):
    assert rows(sqlite, "SELECT * FROM tickets ORDER BY id", path="t.db") == [
        Row(values, "t.db", i) for i, values in enumerate(TICKETS, start=1)
    ]


def test_sqlite_in_a_folder_that_may_not_be_written(sqlite: Path):
    """Catches log files that reading makes: whet may not leave a trace beside the records."""
    with sqlite3.connect(sqlite / "t.db") as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    connection.close()
    assert len(rows(sqlite, "SELECT * FROM tickets", path="t.db")) == 2
    assert [path.name for path in sqlite.iterdir()] == ["t.db"]


def test_sqlite_sees_what_is_in_the_log(sqlite: Path):
    writer = sqlite3.connect(sqlite / "t.db")
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("INSERT INTO tickets VALUES (3, 'q', 'a')")
    writer.commit()
    assert len(rows(sqlite, "SELECT * FROM tickets", path="t.db")) == 3
    writer.close()


def test_sqlite_text_that_is_not_utf8_costs_its_row(sqlite: Path):
    with sqlite3.connect(sqlite / "t.db") as connection:
        connection.execute("INSERT INTO tickets VALUES (3, CAST(x'636166e9' AS TEXT), 'a'), (4, 'q', 'a')")
    connection.close()
    faults: list[WhetError] = []
    origin = Origin("t.db", sql="SELECT * FROM tickets ORDER BY id")
    assert [row.line for row in read_rows(origin, base=sqlite, on_error=faults.append)] == [1, 2, 4]
    assert [fault.where for fault in faults] == ["t.db:3"]


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT * FRM tickets", "syntax error"),
        ("SELECT * FROM absent", "no such table"),
        ("DELETE FROM tickets", "not authorized"),
        ("ATTACH 'other.db' AS o", "not authorized"),
        ("PRAGMA writable_schema=1", "not authorized"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("", "one SELECT"),
        ("SELECT 1 AS a, 2 AS a", "'a' appears twice"),
        ("SELECT * FROM tickets WHERE 0", "no rows"),
    ],
)
def test_sqlite_queries_that_fail(sqlite: Path, sql: str, says: str):
    before = (sqlite / "t.db").read_bytes()
    assert says in fault(sqlite, sql, path="t.db").what
    assert (sqlite / "t.db").read_bytes() == before
    assert [path.name for path in sqlite.iterdir()] == ["t.db"]


def test_a_damaged_database(sqlite: Path):
    content = bytearray((sqlite / "t.db").read_bytes())
    content[4096 : 4096 + 64] = b"\xff" * 64
    (sqlite / "t.db").write_bytes(content)
    assert "malformed" in fault(sqlite, "SELECT * FROM tickets", path="t.db").what
    for raw, says in ((b"", "empty"), (b"no database at all", "neither a database")):
        (sqlite / "t.db").write_bytes(raw)
        assert says in fault(sqlite, "SELECT 1", path="t.db").what
    assert "no file matches" in fault(sqlite, "SELECT 1", path="u.db").what


# ---------------------------------------------------------------- DuckDB


@pytest.fixture
def duck(tmp_path: Path) -> Path:
    with duckdb.connect(str(tmp_path / "t.duckdb")) as connection:
        connection.execute("CREATE TABLE tickets (id INTEGER, question TEXT, answer TEXT)")
        connection.executemany("INSERT INTO tickets VALUES (?, ?, ?)", [list(ticket.values()) for ticket in TICKETS])
        connection.execute(
            "CREATE TABLE chats AS SELECT [{'role': 'user', 'content': 'Hi'}] AS messages, now() AS seen"
        )
    return tmp_path


def test_duckdb_rows(duck: Path):
    assert rows(duck, "SELECT * FROM tickets ORDER BY id", path="t.duckdb") == [
        Row(values, "t.duckdb", i) for i, values in enumerate(TICKETS, start=1)
    ]
    (chat,) = rows(duck, "SELECT messages, seen FROM chats", path="t.duckdb")
    assert chat.values["messages"] == [{"role": "user", "content": "Hi"}]
    assert chat.values["seen"].utcoffset() == datetime.timedelta(0)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT * FRM tickets", "syntax error"),
        ("SELECT * FROM nothing", "does not exist"),
        ("SELECT * FROM secrets_of_python", "does not exist"),
        ("DELETE FROM tickets", "one SELECT"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("", "one SELECT"),
        ("COPY tickets TO 'out.csv'", "one SELECT"),
        ("ATTACH 'other.db'", "one SELECT"),
        ("INSTALL sqlite", "one SELECT"),
        ("SET threads = 2", "one SELECT"),
        ("SELECT * FROM read_text('/etc/passwd')", "disabled by configuration"),
        ("SELECT * FROM '/etc/passwd'", "does not exist"),
        ("SELECT * FROM 'https://example.com/a.parquet'", "disabled by configuration"),
        ("SELECT * FROM glob('/*')", "disabled by configuration"),
        ("SELECT 1 AS a, 2 AS a", "'a' appears twice"),
        ("SELECT * FROM tickets WHERE false", "no rows"),
    ],
)
def test_duckdb_queries_that_fail(duck: Path, sql: str, says: str):
    """Catches a query that reads another file, the network or Python's variables, writes, or loads an extension."""
    secrets_of_python = pa.table({"a": [1]})
    assert secrets_of_python.num_rows
    assert says in fault(duck, sql, path="t.duckdb").what
    assert [path.name for path in duck.iterdir()] == ["t.duckdb"]


def test_values_of_records_stay_out_of_duckdb_messages(duck: Path):
    error = fault(duck, "SELECT question::INT FROM tickets", path="t.duckdb")
    assert "Could not convert string" in error.what
    assert "Où" not in str(error)


def test_table_files_are_the_table_source(tmp_path: Path):
    """Catches account numbers that lose their zeros, and files whose columns are not put together by name."""
    pq.write_table(pa.table({"n": [1, 2], "t": ["a", "b"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"t": ["c"], "n": [3]}), tmp_path / "2.parquet")
    (tmp_path / "it's.csv").write_text('account,text\n007,"a, b"\n')
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}], "n": 1}\n{"n": 2}\n')
    assert [r.values for r in rows(tmp_path, "SELECT t FROM source WHERE n > 1 ORDER BY n", path="*.parquet")] == [
        {"t": "b"},
        {"t": "c"},
    ]
    assert rows(tmp_path, "SELECT * FROM source", path="it's.csv")[0].values == {"account": "007", "text": "a, b"}
    assert rows(tmp_path, "SELECT messages FROM source WHERE n = 1", path="a.jsonl")[0].values == {
        "messages": [{"role": "user", "content": "Hi"}]
    }
    (tmp_path / "z.csv.gz").write_bytes(gzip.compress(b"a\n01\n", mtime=0))
    assert rows(tmp_path, "SELECT * FROM source", path="z.csv.gz")[0].values == {"a": "01"}
    (tmp_path / "z.jsonl.zst").write_bytes(pa.compress(b'{"a": 1}\n', codec="zstd", asbytes=True))
    assert rows(tmp_path, "SELECT * FROM source", path="z.jsonl.zst")[0].values == {"a": 1}
    assert "of one kind" in fault(tmp_path, "SELECT 1", path="*").what
    assert "disabled" in fault(tmp_path, f"SELECT * FROM '{tmp_path}/1.parquet'", path="a.jsonl").what
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    assert "bad.parquet" in fault(tmp_path, "SELECT * FROM source", path="bad.parquet").what
    (tmp_path / "bad.csv").write_text("a,b\n" + "1,2\n" * 30_000 + "Jane Roe,3,4\n")
    error = fault(tmp_path, "SELECT * FROM source", path="bad.csv")
    assert "CSV Error on Line: 30002" in error.what
    assert "Jane" not in str(error)
