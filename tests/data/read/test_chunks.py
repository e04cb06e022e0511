"""Chunks: together they are exactly what `read_rows` gives, and a key stands for what its chunk gives."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.read.chunks import Chunk, chunks, read_chunk
from whet.data.read.rows import Origin, Row, read_rows
from whet.errors import WhetError

Item = Row | tuple[str, str | None]


def in_order(read: Callable[[Callable[[WhetError], None]], Iterator[Row]]) -> list[Item]:
    """Rows, and what and where of faults, as they come."""
    items: list[Item] = []
    for row in read(lambda fault: items.append((fault.what, fault.where))):
        items.append(row)
    return items


def whole(pattern: str | Origin, base: Path) -> list[Item]:
    return in_order(lambda note: read_rows(pattern, base=base, on_error=note))


def in_chunks(made: list[Chunk]) -> list[Item]:
    return [item for chunk in made for item in in_order(lambda note, chunk=chunk: read_chunk(chunk, note))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chunks")


LINES = st.sampled_from(
    [b'{"a": 1}', b'{"t": "caf\xc3\xa9 \xe2\x80\xa8"}', b"", b" \t", b"\xc2\xa0", b"oops", b"[1]", b'{"a": "\xe9"}']
) | st.dictionaries(st.text(max_size=3), st.text(max_size=40), max_size=3).map(lambda row: json.dumps(row).encode())
CELLS = st.sampled_from(["a,b", "1,2", '"x\ny",3', '"', "1", "é,ü", "\n", "\r\n", ",", "a"])
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n"])


@settings(deadline=None, max_examples=200)
@given(
    lines=st.lists(st.tuples(LINES, ENDS), max_size=30),
    mark=st.booleans(),
    cut_end=st.booleans(),
    target=st.integers(1, 200),
    kind=st.sampled_from(["jsonl", "ndjson", "json", "jsonl.gz"]),
)
def test_chunks_of_json_lines_are_the_file(
    folder: Path, lines: list[tuple[bytes, bytes]], mark: bool, cut_end: bool, target: int, kind: str
):
    """Catches a row lost or doubled at a cut, line numbers that drift, and faults that end a chunk but not a file."""
    raw = b"\xef\xbb\xbf" * mark + b"".join(line + end for line, end in lines)
    raw = raw.rstrip(b"\r\n") if cut_end else raw
    for old in folder.iterdir():
        old.unlink()
    (folder / f"a.{kind}").write_bytes(gzip.compress(raw, mtime=0) if kind.endswith("gz") else raw)
    made = chunks(f"a.{kind}", folder, target)
    assert in_chunks(made) == whole(f"a.{kind}", folder)
    assert {(piece.sha256, piece.bytes) for chunk in made for piece in chunk.pieces} == {
        (made[0].pieces[0].sha256, (folder / f"a.{kind}").stat().st_size)
    }


@settings(deadline=None, max_examples=100)
@given(
    raw=st.lists(st.sampled_from(["a,b", "1,2", '"x\ny",3', '"', "1", "é,ü", "\n", "\r\n", ",", "a"]), max_size=20).map(
        "".join
    ),
    mark=st.booleans(),
    target=st.integers(1, 100),
)
def test_chunks_of_csv_are_the_files(folder: Path, raw: str, mark: bool, target: int):
    for name in ("a.csv", "b.csv", "c.tsv"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" * mark + raw.encode())
    assert in_chunks(chunks("*sv", folder, target)) == whole("*sv", folder)


@pytest.mark.parametrize("target", [50, 400, 10**9])
def test_chunks_of_every_other_kind(tmp_path: Path, target: int):
    """Catches row groups, rows of saved data sets or whole files that are left out or read twice."""
    pq.write_table(pa.table({"n": range(100)}), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    (tmp_path / "d.txt").write_text("text")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "f.html").write_text("<p>x")
    (tmp_path / "g.json").write_text(json.dumps([{"a": i} for i in range(50)]))
    (tmp_path / "h.unknown").write_text("x")
    made = chunks("*.*", tmp_path, target)
    assert in_chunks(made) == whole("*.*", tmp_path)
    assert len(in_chunks(made)) == 100 + 1 + 1 + 1 + 1 + 1 + 50 + 1
    datasets.Dataset.from_dict({"n": list(range(500))}).save_to_disk(str(tmp_path / "set"))
    made = chunks("set", tmp_path, target)
    assert in_chunks(made) == whole("set", tmp_path)
    assert len(in_chunks(made)) == 500


def test_damage_within_a_parquet_file_costs_its_row_group_only(tmp_path: Path):
    """Catches a file that gives other rows whole than in parts."""
    texts = [f"row {i} {'x' * 50}" for i in range(4000)]
    pq.write_table(
        pa.table({"t": texts}), tmp_path / "a.parquet", row_group_size=1000, compression="none", use_dictionary=False
    )
    raw = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = raw.index(b"row 1500 ") - 2000
    raw[middle : middle + 8] = b"\xff" * 8
    (tmp_path / "a.parquet").write_bytes(raw)
    items = whole("a.parquet", tmp_path)
    assert in_chunks(chunks("a.parquet", tmp_path, 1000)) == items
    assert [item.line for item in items[-2000:] if isinstance(item, Row)] == list(range(2001, 4001))


def test_chunks_are_of_the_size_asked_for(tmp_path: Path):
    """Catches a chunk for each of a million small files, and one chunk for a file of a terabyte."""
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text("x" * 100)
    assert [len(chunk.pieces) for chunk in chunks("*.txt", tmp_path, 1000)] == [10] * 10
    (tmp_path / "a.jsonl").write_text('{"a": "0123456789"}\n' * 1000)
    made = chunks("a.jsonl", tmp_path, 1000)
    assert [chunk.pieces[0].line for chunk in made] == list(range(1, 1000, 50))
    sizes = {(chunk.pieces[0].stop or 0) - chunk.pieces[0].start for chunk in made}
    assert sizes == {1000}


def test_keys_stand_for_what_chunks_give(tmp_path: Path):
    """Catches results of old content that are taken for the new, and results thrown away without need."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "a.jsonl").write_text('{"a": "0123456789"}\n' * 100)
    (first / "b.md").write_text("# T")
    shutil.copytree(first, second)
    os.utime(second / "a.jsonl", (1, 1))

    def keys(base: Path, target: int = 500) -> list[str]:
        return [chunk.key for chunk in chunks(".", base, target)]

    before = keys(first)
    assert len(set(before)) == len(before) == 5
    assert keys(second) == before, "another folder, another time"
    with (second / "a.jsonl").open("a") as file:
        file.write('{"b": 1}\n' * 100)
    assert keys(second)[:4] == before[:4], "rows that were there before"
    assert len(keys(second)) > 5
    (second / "a.jsonl").write_text('{"a": "0123456788"}\n' + '{"a": "0123456789"}\n' * 99)
    changed = keys(second)
    assert changed[0] != before[0]
    assert changed[1:] == before[1:]
    (second / "a.jsonl").write_text("\n" + '{"a": "0123456789"}\n' * 100)
    assert not set(keys(second)[:4]) & set(before), "the same rows on other lines"
    (first / "a.jsonl").rename(first / "0.jsonl")
    assert not set(keys(first)[:4]) & set(before), "the same rows under another name"


def test_chunks_travel(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 100)
    for chunk in chunks("a.jsonl", tmp_path, 300):
        assert Chunk.from_json(json.loads(json.dumps(chunk.to_json()))) == chunk
        assert pickle.loads(pickle.dumps(chunk)) == chunk


def test_a_file_that_changes_between_plan_and_reading(tmp_path: Path):
    """Catches rows of the new content under the key of the old."""
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 10)
    (chunk,) = chunks("a.jsonl", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a": 2}\n' * 11)
    with pytest.raises(WhetError, match="changed while it was being read"):
        list(read_chunk(chunk, lambda fault: None))
    (chunk,) = chunks("a.jsonl", tmp_path)
    reading = read_chunk(chunk, lambda fault: None)
    next(reading)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(WhetError, match="changed while it was being read"):
        list(reading)


def test_queries_are_kept_by_their_answer(tmp_path: Path):
    """Catches the answer of an old state of the database, and keys that change with tables the query does not read."""
    database = sqlite3.connect(tmp_path / "t.db")
    database.executescript("CREATE TABLE t (n INTEGER); INSERT INTO t VALUES (1), (2); CREATE TABLE other (n INTEGER)")
    origin = Origin("t.db", sql="SELECT n FROM t ORDER BY n")
    (chunk,) = chunks(origin, tmp_path)
    assert [row.values["n"] for row in read_chunk(chunk)] == [1, 2]
    database.executescript("INSERT INTO other VALUES (1)")
    assert chunks(origin, tmp_path)[0].key == chunk.key
    database.executescript("UPDATE t SET n = 3 WHERE n = 2")
    database.close()
    with pytest.raises(WhetError, match="another answer"):
        list(read_chunk(chunk))
    assert chunks(origin, tmp_path)[0].key != chunk.key
    wrong = Origin("t.db", sql="SELECT x FROM t")
    assert in_chunks(chunks(wrong, tmp_path)) == whole(wrong, tmp_path)
