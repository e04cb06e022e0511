"""Where files are cut: the parts are the file, whatever lies in it, and cuts are where they were asked for."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.read.test_chunks import ENDS, LINES, Item, in_chunks, whole
from whet.data.read import cuts, piece, record_ends
from whet.data.read.chunks import Chunk, chunks
from whet.data.read.rows import Origin, Row

MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuts")


def zstd(raw: bytes) -> bytes:
    return bytes(pa.compress(raw, codec="zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@contextmanager
def limits(block: int, field: int, line: int) -> Iterator[None]:
    """Small ones, so that small files meet them."""
    before = csv.field_size_limit(field)
    try:
        with patch.object(record_ends, "BLOCK", block), patch.object(piece, "LONGEST_LINE", line):
            yield
    finally:
        csv.field_size_limit(before)


# Bytes of any kind, and fields as programs write them; a file of the latter alone is checked without the parser.
STRAY = st.lists(
    st.sampled_from([b'"', b'""', b",", b"\t", b"\n", b"\r\n", b"\r", b"a", b" ", b"\xc3\xa9", b"\xe9", b"\0", MARK]),
    max_size=6,
).map(b"".join)
QUOTED = st.lists(st.sampled_from([b'""', b",", b"\n", b"\r\n", b"b", b"\xe9", b"\t"]), max_size=5).map(
    lambda inside: b'"' + b"".join(inside) + b'"'
)
PLAIN = st.sampled_from([b"", b"1", b"two", b"\xc3\xbc"])


def records(field: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes]]:
    record = st.lists(field, min_size=2, max_size=2).map(b",".join) | field
    return st.lists(st.tuples(record, ENDS).map(b"".join), max_size=20)


CSV = st.tuples(
    st.sampled_from([b"a,b\n", b'"a","b\n"\r\n', b"\n\r\na,b\n", b"a\tb\n", b"a\n"]) | st.just(b"") | STRAY,
    st.one_of(records(PLAIN), records(PLAIN | QUOTED), records(PLAIN | QUOTED | STRAY)),
    st.sampled_from([b"", b"1,2", b'"1', b'1,"x"', b"\n\n\n"]),
)


@settings(deadline=None, max_examples=400)
@given(
    parts=CSV,
    mark=st.booleans(),
    target=st.integers(1, 60),
    block=st.integers(1, 40),
    field=st.sampled_from([4, 30, 131072]),
    line=st.sampled_from([12, 40, 1 << 20]),
    kind=st.sampled_from([".csv", ".tsv"]),
    ending=st.sampled_from(list(COMPRESS)),
)
def test_parts_of_csv_are_the_file(
    folder: Path,
    parts: tuple[bytes, list[bytes], bytes],
    mark: bool,
    target: int,
    block: int,
    field: int,
    line: int,
    kind: str,
    ending: str,
):
    """Catches a cut in quotes, or after what ends the file; a stray quote that counts; a part without its header."""
    header, lines, end = parts
    raw = MARK * mark + header + b"".join(lines) + end
    for old in folder.iterdir():
        old.unlink()
    (folder / f"a{kind}{ending}").write_bytes(COMPRESS[ending](raw))
    (folder / "b.unknown").write_bytes(b"")
    origin = Origin(".", skip_unreadable=True)
    with limits(block, field, line), patch.object(cuts, "COMPRESSED_PARTS", 1):
        assert in_chunks(chunks(origin, folder, target)) == whole(origin, folder)


@pytest.mark.parametrize(
    "odd",
    [
        b"x\ry,1\n",
        b'"x\ry",1\n',
        b'"x" ,1\n',
        b'"x"a,"\n1"\n',
        b'5" pipe,1\n',
        b'5" pipe,1\n"5"" pipe","1\n2"\n',
        b'"1\n',
        b'"""\n""",1\n',
        b'"",""\n',
        b"x" * 50 + b",1\n",
        MARK + b'"x\n",1\n"y\nz",2\n',
        b'\xe9"\n"x\xe9\n",1\n',
        b"\0\n,\n",
    ],
)
def test_an_odd_record_amid_good_ones(tmp_path: Path, odd: bytes):
    """Catches rows after the place where the reader gives up the file, and each way to miss that place."""
    good = b'1,"a\nb"\n2,b\n'
    (tmp_path / "a.csv").write_bytes(MARK + b"a,b\n" + good * 5 + odd + good * 5)
    for block in (1, 5, 17, 1 << 20):
        with limits(block, 40, 1 << 20):
            expected = whole("a.csv", tmp_path)
            made = chunks("a.csv", tmp_path, 14)
            assert in_chunks(made) == expected
            assert len(made) >= 5


@settings(deadline=None, max_examples=100)
@given(
    lines=st.lists(st.tuples(LINES, ENDS), max_size=30),
    mark=st.booleans(),
    target=st.integers(1, 200),
    block=st.integers(len(MARK), 40),
    line=st.sampled_from([12, 1 << 20]),
    ending=st.sampled_from(list(COMPRESS)),
)
def test_parts_of_json_lines_are_the_file(
    folder: Path, lines: list[tuple[bytes, bytes]], mark: bool, target: int, block: int, line: int, ending: str
):
    raw = MARK * mark + b"".join(content + end for content, end in lines)
    name = f"a.jsonl{ending}"
    (folder / name).write_bytes(COMPRESS[ending](raw))
    with limits(block, 131072, line), patch.object(cuts, "COMPRESSED_PARTS", 1):
        assert in_chunks(chunks(name, folder, target)) == whole(name, folder)


def starts(made: list[Chunk]) -> list[tuple[int, int | None, int]]:
    return [(part.start, part.stop, part.line) for chunk in made for part in chunk.pieces]


@pytest.mark.parametrize("field", ["x" * 90, '"' + "y\n" * 44 + '"', 'x"' * 45, '"' + 'z""' * 29 + '"'])
@pytest.mark.parametrize("block", [256, 1 << 20])
def test_csv_is_cut_at_the_first_end_of_a_record_that_is_far_enough(tmp_path: Path, field: str, block: int):
    """Catches files that are left whole, and cuts that move with the blocks that are read."""
    record = f"{field},1\n".encode()
    header = b"text,n\n"
    for name, raw in (("a.csv", header + record * 1000), ("b.csv", header + record * 1500)):
        (tmp_path / name).write_bytes(raw)
    size = len(record)
    with patch.object(record_ends, "BLOCK", block):
        shorter, longer = chunks("a.csv", tmp_path, 10 * size), chunks("b.csv", tmp_path, 10 * size)
    expected = range(len(header) + 10 * size, len(header) + 1000 * size, 10 * size)
    assert [start for start, _, _ in starts(shorter)] == [0, *expected]
    assert starts(longer)[: len(shorter) - 1] == starts(shorter)[:-1]
    assert in_chunks(shorter) == whole("a.csv", tmp_path)


def test_keys_of_csv_cover_the_header(tmp_path: Path):
    """Catches rows of the old columns under new names, and parts thrown away that did not change."""
    body = "".join(f"{i:04},text\n" for i in range(1000))

    def keys(raw: str) -> list[str]:
        (tmp_path / "a.csv").write_text(raw)
        return [chunk.key for chunk in chunks("a.csv", tmp_path, 1000)]

    before = keys("n,t\n" + body)
    assert len(set(before)) == len(before) == 10
    assert not set(keys("n,u\n" + body)) & set(before)
    assert keys("n,t\n" + body + "1000,more\n")[:9] == before[:9]
    changed = keys("n,t\n" + body.replace("0500,text", "0500,TEXT"))
    assert [key == old for key, old in zip(changed, before, strict=True)].count(False) == 1


def test_keys_of_compressed_parts_are_of_what_is_in_them(tmp_path: Path):
    """Catches an export that is read anew as a whole because rows were added, or it was compressed anew."""
    lines = "".join(json.dumps({"n": i, "x": random.Random(i).random()}) + "\n" for i in range(3000)).encode()

    def keys(raw: bytes) -> list[str]:
        (tmp_path / "a.jsonl.gz").write_bytes(raw)
        return [chunk.key for chunk in chunks("a.jsonl.gz", tmp_path, 1000)]

    before = keys(gzip.compress(lines, 9, mtime=0))
    assert len(set(before)) == len(before) > 9
    assert keys(gzip.compress(lines, 1, mtime=0)) == before
    assert keys(gzip.compress(lines, mtime=0) + gzip.compress(b'{"n": 1}\n', mtime=0))[:-1] == before[:-1]


def test_small_compressed_files_are_one_piece(tmp_path: Path):
    """Catches small files that are decompressed only to be hashed."""
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a\n" + b"1\n" * 1000, mtime=0))
    with patch.object(cuts, "records_of", side_effect=AssertionError):
        (chunk,) = chunks("a.csv.gz", tmp_path, 1000)
    assert chunk.pieces[0].is_whole


def damaged(raw: bytes) -> Iterator[bytes]:
    """Cut short; with a wrong checksum; with wrong bytes at several places; with something behind the end."""
    yield raw[: len(raw) // 2]
    yield raw[:-8] + b"\0" * 8
    for place in (1000, len(raw) // 3, len(raw) * 9 // 10):
        yield raw[:place] + b"\xff" * 200 + raw[place + 200 :]
    yield raw + b"no gzip"


@pytest.mark.parametrize("kind", [".jsonl.gz", ".csv.gz", ".jsonl.zst", ".csv.zst"])
def test_damaged_compression_gives_the_rows_before_it_and_one_fault(tmp_path: Path, kind: str):
    """Catches rows that are lost or added with the damage by where a reader began, and a fault for each part."""
    rng = random.Random(0)
    numbers = [(i, rng.random()) for i in range(20_000)]
    if kind.startswith(".csv"):
        raw = b"a,b\n" + b"".join(b'%d,"%f"\n' % pair for pair in numbers)
    else:
        raw = b"".join(b'{"a": %d, "b": %f}\n' % pair for pair in numbers)
    name, faults, most = f"a{kind}", [], 0
    for content in damaged(COMPRESS["." + kind.rpartition(".")[2]](raw)):
        (tmp_path / name).write_bytes(content)
        expected: list[Item] = whole(name, tmp_path)
        with patch.object(record_ends, "BLOCK", 5000):
            made = chunks(name, tmp_path, 3000)
        assert in_chunks(made) == expected
        faults += [item[0] for item in expected[-1:] if not isinstance(item, Row)]
        most = max(most, len(made))
    assert sum(what.startswith("not readable as .") for what in faults) >= 4
    assert most > 10
