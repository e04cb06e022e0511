"""Reading files into rows: what was written comes back, and every fault names its place."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.faults import Faults
from whet.data.read import piece as read_piece
from whet.data.read.rows import READERS, Origin, Row, read_rows
from whet.errors import WhetError, WhetErrors

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def rows_of(folder: Path, name: str, content: str | bytes) -> list[Row]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return list(read_rows(name, base=folder))


def fault_of(folder: Path, name: str, content: str | bytes) -> WhetError:
    with pytest.raises(WhetError) as caught:
        rows_of(folder, name, content)
    assert caught.value.fix
    return caught.value


@settings(deadline=None, max_examples=100)
@given(records=RECORDS, blank=st.sampled_from(["", "\n", " \n"]), mark=st.booleans(), ascii=st.booleans())
def test_json_lines_round_trip(folder: Path, records: list[dict[str, object]], blank: str, mark: bool, ascii: bool):
    """Catches readers that split on U+2028, choke on a byte-order mark, or count blank lines wrongly."""
    text = "".join(blank + json.dumps(record, ensure_ascii=ascii) + "\n" for record in records)
    rows = rows_of(folder, "a.jsonl", text.encode("utf-8-sig" if mark else "utf-8"))
    assert [row.values for row in rows] == records
    step = 1 + bool(blank)
    assert [row.line for row in rows] == [step * (i + 1) for i in range(len(records))]
    assert {row.source for row in rows} == {"a.jsonl"}


@settings(deadline=None, max_examples=50)
@given(records=RECORDS, indent=st.sampled_from([None, 2]))
def test_json_arrays_round_trip(folder: Path, records: list[dict[str, object]], indent: int | None):
    rows = rows_of(folder, "a.json", json.dumps(records, indent=indent))
    assert [row.values for row in rows] == records
    assert [row.line for row in rows] == list(range(1, len(records) + 1))


CELL_CHARACTERS = st.sampled_from('a\n",\t ') | st.characters(exclude_characters="\r\0", exclude_categories=["Cs"])
CELLS = st.text(CELL_CHARACTERS, min_size=1)


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), extension=st.sampled_from(["csv", "tsv"]))
def test_csv_round_trips_with_the_line_each_record_starts_on(folder: Path, rows: list[tuple[str, str]], extension: str):
    """Catches line numbers that drift after a quoted line break."""
    path = folder / f"a.{extension}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if extension == "tsv" else ",", lineterminator="\n")
        writer.writerows([("question", "answer"), *rows])
    read = list(read_rows(path.name, base=folder))
    assert [(row.values["question"], row.values["answer"]) for row in read] == rows
    line = 2
    for row, cells in zip(read, rows, strict=True):
        assert row.line == line
        line += 1 + sum(cell.count("\n") for cell in cells)


def test_parquet_keeps_nested_values(tmp_path: Path):
    records = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": [], "n": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert list(read_rows("a.parquet", base=tmp_path)) == [
        Row(record, "a.parquet", number) for number, record in enumerate(records, start=1)
    ]


@settings(deadline=None, max_examples=40)
@given(
    records=st.lists(
        st.fixed_dictionaries(
            {
                "text": st.none() | st.text(),
                "count": st.none() | st.integers(-(2**63), 2**63 - 1),
                "share": st.none() | st.floats(allow_nan=False),
                "turns": st.none()
                | st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.text()}), max_size=3),
            }
        ),
        min_size=1,
        max_size=8,
    ),
    row_group=st.integers(1, 4),
)
def test_parquet_round_trips_across_row_groups(folder: Path, records: list[dict[str, object]], row_group: int):
    turn = pa.struct({"role": pa.string(), "content": pa.string()})
    schema = pa.schema({"text": pa.string(), "count": pa.int64(), "share": pa.float64(), "turns": pa.list_(turn)})
    pq.write_table(pa.Table.from_pylist(records, schema), folder / "p.parquet", row_group_size=row_group)
    assert list(read_rows("p.parquet", base=folder)) == [
        Row(record, "p.parquet", number) for number, record in enumerate(records, start=1)
    ]


def test_parquet_rows_are_numbered_through_the_whole_file(tmp_path: Path):
    """Catches numbers that start again in each batch of 65,536 rows."""
    pq.write_table(pa.table({"n": range(1, 70_001)}), tmp_path / "a.parquet")
    assert all(row.line == row.values["n"] for row in read_rows("a.parquet", base=tmp_path))


def test_extensions_in_capitals_and_ndjson(tmp_path: Path):
    for name in ("A.JSONL", "a.ndjson", "a.json"):
        assert rows_of(tmp_path, name, '{"a": 1}\n{"a": 2}\n')[1] == Row({"a": 2}, name, 2)
    assert rows_of(tmp_path, "A.TSV", "a\tb\r\n1\t2, 3\r\n")[0].values == {"a": "1", "b": "2, 3"}


@pytest.mark.parametrize("extension", sorted(set(READERS) - {".parquet"}))
@settings(deadline=None, max_examples=40)
@given(content=st.binary(max_size=40) | st.text('[]{}":,01\n\r\t \\u\0é', max_size=40).map(str.encode))
def test_no_content_makes_a_traceback(folder: Path, extension: str, content: bytes):
    """Whatever the bytes, what comes out is rows or faults that name the file and the fix."""
    (folder / f"f{extension}").write_bytes(content)
    faults: list[WhetError] = []
    rows = list(read_rows(f"f{extension}", base=folder, on_error=faults.append))
    assert rows or faults
    assert all(fault.fix and str(fault.where).startswith(f"f{extension}") for fault in faults)


def test_damaged_parquet_is_called_so(tmp_path: Path):
    """Catches damage taken for a fault of the disk, and wrong text or dates that end in a traceback."""
    good = tmp_path / "good.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(3000)]}), good)
    content = bytearray(good.read_bytes())
    cut = bytes(content[:-20])
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9")])
    pq.write_table(pa.table({"text": latin}), tmp_path / "latin.parquet")
    pq.write_table(pa.table({"day": pa.array([10**9], pa.int32()).cast(pa.date32())}), tmp_path / "date.parquet")
    for name, damaged in (
        ("a.parquet", cut),
        ("a.parquet", bytes(content)),
        ("a.parquet", b""),
        ("latin.parquet", (tmp_path / "latin.parquet").read_bytes()),
        ("date.parquet", (tmp_path / "date.parquet").read_bytes()),
    ):
        error = fault_of(tmp_path, name, damaged)
        assert error.what.startswith("not readable as Parquet"), name
        assert error.where == name


def test_parquet_with_a_column_twice_or_no_rows(tmp_path: Path):
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "twice.parquet")
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    for name, says in (("twice.parquet", "'a' appears twice"), ("none.parquet", "no rows")):
        with pytest.raises(WhetError, match=says) as caught:
            list(read_rows(name, base=tmp_path))
        assert caught.value.where == name


def test_old_line_ends_get_their_own_fix(tmp_path: Path):
    """Catches the advice to close quotes that the file does not have."""
    assert "line feed" in (fault_of(tmp_path, "a.csv", "a,b\r1,2\r").fix or "")


@pytest.mark.parametrize(
    "pattern", ["x" * 300 + ".jsonl", "~nobody-of-this-name/a.jsonl", "x\0.jsonl", "", "f.jsonl/a"]
)
def test_impossible_paths_are_faults(tmp_path: Path, pattern: str):
    (tmp_path / "f.jsonl").write_text("{}\n")
    with pytest.raises(WhetError) as caught:
        list(read_rows(pattern, base=tmp_path))
    assert caught.value.fix


def test_a_text_file_is_one_document_line_ends_kept(tmp_path: Path):
    assert rows_of(tmp_path, "a.md", "# T\r\n\nx\u2028y\n")[0].values == {"text": "# T\r\n\nx\u2028y\n"}


def test_files_come_in_the_order_of_their_names(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ["b.jsonl", "a.jsonl", "sub/c.jsonl", "[x].jsonl"]:
        (tmp_path / name).write_text('{"a": 1}\n')
    assert [row.source for row in read_rows("**/*.jsonl", base=tmp_path)] == [
        "[x].jsonl",
        "a.jsonl",
        "b.jsonl",
        "sub/c.jsonl",
    ]
    assert [row.source for row in read_rows("[x].jsonl", base=tmp_path)] == ["[x].jsonl"]
    absolute = str(tmp_path / "a.jsonl")
    assert [row.source for row in read_rows(absolute, base=Path("/"))] == [absolute]


@pytest.mark.parametrize(
    ("name", "content", "where", "says"),
    [
        ("a.jsonl", "", "a.jsonl", "empty"),
        ("a.jsonl", "\n\n", "a.jsonl", "no rows"),
        ("a.json", "[]", "a.json", "no rows"),
        ("a.csv", "question,answer\n", "a.csv", "no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": }\n', "a.jsonl:2", "column 7"),
        ("a.json", '[{"a": 1},\n {"a": 2},\n oops]', "a.json:3", "column 2"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2", "an array"),
        ("a.jsonl", "null\n", "a.jsonl:1", "null"),
        ("a.json", '[{"a": 1}, "x"]', "a.json:2", "a string"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1", "cannot be read"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "a.jsonl:2", "byte 0xe9 at byte 11"),
        ("a.txt", b"\xff\xfeh\x00", "a.txt:1", "not UTF-8"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3", "3 fields where the header has 2"),
        ("a.csv", 'a,b\n"1\n2",3\n1\n', "a.csv:4", "1 fields"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv:1", "'a' appears twice"),
        ("a.csv", 'a,b\n1,2\n"x,3\n', "a.csv:3", "not valid CSV"),
        ("a.csv", "a\n" + "x" * 200_000 + "\n", "a.csv:2", "field limit"),
        ("a.parquet", b"PAR1 this is no table PAR1", "a.parquet", "not readable as Parquet"),
        ("a.xlsx", b"PK", "a.xlsx", ".xlsx"),
        ("data", b"x", "data", "without extension"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz", "not readable as .gz: Not a gzipped file"),
        ("a.jsonl.gz", b"", "a.jsonl.gz", "the file is empty"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "a.jsonl.gz", "not readable as .gz"),
        ("a.csv.gz", gzip.compress(b"a,b\n1\n", mtime=0), "a.csv.gz:2", "1 fields"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst", "not readable as .zst"),
        ("a.jsonl.zst", pa.compress(b'{"a": 1}\n' * 9, codec="zstd", asbytes=True)[:-3], "a.jsonl.zst", ".zst"),
        ("a.tar.gz", b"x", "a.tar.gz", "what kind of file .tar.gz is"),
    ],
)
def test_faults_name_the_place_and_the_fix(tmp_path: Path, name: str, content: str | bytes, where: str, says: str):
    error = fault_of(tmp_path, name, content)
    assert error.where == where
    assert says in error.what


def test_a_path_that_matches_nothing_gets_near_names(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tickets.jsonl").write_text('{"a": 1}\n')
    for pattern, near in [
        ("data/ticket.jsonl", "tickets.jsonl"),
        ("dat/tickets.jsonl", "data/"),
        ("data/*.csv", "tickets.jsonl"),
        ("nowhere/**/x.csv", "data/"),
    ]:
        with pytest.raises(WhetError) as caught:
            list(read_rows(pattern, base=tmp_path))
        assert near in (caught.value.fix or ""), pattern


def test_reading_goes_on_after_a_fault_and_names_them_all(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\noops\n{"a": 2}\n[]\n')
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.jsonl").write_text('{"a": 3}\n')
    faults: list[WhetError] = []
    rows = list(read_rows("*.jsonl", base=tmp_path, on_error=faults.append))
    assert [row.values["a"] for row in rows] == [1, 2, 3]
    assert [fault.where for fault in faults] == ["a.jsonl:2", "a.jsonl:4", "b.jsonl"]


def test_twenty_faults_are_enough(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("oops\n" * 100)
    with pytest.raises(WhetErrors) as caught:
        list(read_rows("a.jsonl", base=tmp_path, on_error=Faults().add))
    assert len(caught.value.errors) == 21
    assert "may be more" in str(caught.value)


def test_no_permission_says_so(tmp_path: Path):
    """Catches a traceback for a file that may not be read, and for a folder that may not be entered.

    Root may read everything, so the reading is done by a process that has given root up.
    """
    (tmp_path / "locked").mkdir()
    for name in ("a.jsonl", "locked/b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    script = """
        import os
        from pathlib import Path
        from whet.data.read.rows import read_rows
        from whet.errors import WhetError

        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        for pattern in ("a.jsonl", "locked/b.jsonl", "locked/*.jsonl"):
            try:
                list(read_rows(pattern, base=Path(".")))
            except WhetError as error:
                print(error.where, "|", error.what, "|", error.fix)
    """
    tmp_path.chmod(0o755)
    (tmp_path / "a.jsonl").chmod(0)
    (tmp_path / "locked").chmod(0)
    try:
        command = [sys.executable, "-c", textwrap.dedent(script)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["a.jsonl", "locked/b.jsonl", "locked/*.jsonl"]
    assert all("no permission" in line and "chmod" in line for line in lines)


def test_compressed_files_read_as_plain_ones(tmp_path: Path):
    """Catches compressed files of several members or frames, which simple decoders end after the first of."""
    lines = "".join(json.dumps({"text": f"row {i} é"}) + "\r\n" for i in range(5000)).encode()
    plain = rows_of(tmp_path, "a.jsonl", lines)
    halves = (lines[:70_001], lines[70_001:])
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
    (tmp_path / "A.JSONL.ZST").write_bytes(b"".join(pa.compress(half, codec="zstd", asbytes=True) for half in halves))
    for name in ("a.jsonl.gz", "A.JSONL.ZST"):
        rows = list(read_rows(name, base=tmp_path))
        assert [(row.values, row.line) for row in rows] == [(row.values, row.line) for row in plain]
    assert rows_of(tmp_path, "a.csv.gz", gzip.compress(b"\xef\xbb\xbfa\n1\n", mtime=0))[0] == Row(
        {"a": "1"}, "a.csv.gz", 2
    )
    assert rows_of(tmp_path, "a.tsv.gz", gzip.compress(b"a\tb\n1\t2\n", mtime=0))[0].values == {"a": "1", "b": "2"}
    assert rows_of(tmp_path, "a.md.gz", gzip.compress(b"# T", mtime=0))[0].values == {"text": "# T"}


def test_rows_before_the_damage_are_kept(tmp_path: Path):
    whole = gzip.compress("".join(json.dumps({"n": i}) + "\n" for i in range(100_000)).encode(), compresslevel=1)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    faults: list[WhetError] = []
    rows = list(read_rows("a.jsonl.gz", base=tmp_path, on_error=faults.append))
    assert [row.values["n"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 10_000
    assert len(faults) == 1
    assert "cut short" in (faults[0].fix or "")


def test_a_line_that_is_not_utf8_costs_its_row_only(tmp_path: Path):
    """Catches a reader that gives up a million rows for one byte; in CSV, a bad line within quotes is its record's."""
    faults: list[WhetError] = []
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n{"a": 3}\n')
    (tmp_path / "b.csv").write_bytes(b'a,b\n1,2\n"x\xe9",3\n"y\ny\xe9\ny",4\n5,6\n')
    rows = list(read_rows("?.*", base=tmp_path, on_error=faults.append))
    assert [(row.source, row.line) for row in rows] == [("a.jsonl", 1), ("a.jsonl", 3), ("b.csv", 2), ("b.csv", 7)]
    assert [fault.where for fault in faults] == ["a.jsonl:2", "b.csv:3", "b.csv:5"]


def test_half_an_emoji_is_no_text(tmp_path: Path):
    """Catches strings that no later stage can write as UTF-8."""
    content = r'{"a": "\ud83d\ude00 \ud83d", "b": {"\uDE00": ["\\ud83d", 1e400, 123456789012345678901]}}'
    (row,) = rows_of(tmp_path, "a.jsonl", content)
    assert row.values == {"a": "😀 \ufffd", "b": {"\ufffd": ["\\ud83d", float("inf"), 123456789012345678901]}}


def test_a_file_without_lines_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches memory that grows with the file where no line feed comes; what follows the line is still read."""
    monkeypatch.setattr(read_piece, "LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + b"x" * (3 << 20) + b'\n{"a": 3}\n')
    faults: list[WhetError] = []
    rows = list(read_rows("a.jsonl", base=tmp_path, on_error=faults.append))
    assert [row.line for row in rows] == [1, 3]
    assert [fault.where for fault in faults] == ["a.jsonl:2"]


def test_a_folder_is_every_file_in_it(tmp_path: Path):
    """Catches folders below that are left out, hidden files that are read, and an order that the disk decides."""
    for name in (
        "docs/b.md",
        "docs/sub/deep/a.txt",
        "docs/a.html",
        "docs/.git/x.md",
        "docs/.hidden.md",
        "docs/c.jsonl.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = b"<p>page" if name.endswith("html") else b"text"
        (tmp_path / name).write_bytes(gzip.compress(b"{}", mtime=0) if name.endswith("gz") else content)
    for pattern in ("docs", "docs/", "./docs", str(tmp_path / "docs")):
        names = [row.source for row in read_rows(pattern, base=tmp_path)]
        assert [name[name.index("docs") :] for name in names] == [
            "docs/a.html",
            "docs/b.md",
            "docs/c.jsonl.gz",
            "docs/sub/deep/a.txt",
        ]
    assert len(list(read_rows(".", base=tmp_path))) == 4


def test_files_of_other_kinds_in_a_folder_are_told_at_once(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    for name in ("a.md", "b.pdf", "c.pdf", "LICENSE"):
        (tmp_path / "docs" / name).write_text("x")
    with pytest.raises(WhetError, match=r"3 of 4 files .* \.pdf \(2\), no extension \(1\); the first is docs/LICENSE"):
        list(read_rows("docs", base=tmp_path))
    rows = read_rows(Origin("docs", skip_unreadable=True), base=tmp_path)
    assert [row.source for row in rows] == ["docs/a.md"]
    (tmp_path / "docs" / "a.md").unlink()
    with pytest.raises(WhetError, match="no file that can be read"):
        list(read_rows(Origin("docs", skip_unreadable=True), base=tmp_path))


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        (Origin(), "no path"),
        (Origin("a.jsonl", hub="x/y"), "path and hub"),
        (Origin(url="postgresql://h/d"), "needs a query"),
        (Origin(hub="x/y", sql="SELECT 1"), "no query"),
        (Origin("a.jsonl", split="train"), "only a data set has a split"),
        (Origin("a.jsonl", revision="main"), "for hub alone"),
    ],
)
def test_origins_that_contradict_themselves(tmp_path: Path, origin: Origin, says: str):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(WhetError, match=says) as caught:
        list(read_rows(origin, base=tmp_path))
    assert caught.value.fix
