"""Reads rows out of files and remembers where each came from, so that any later fault can name its file and line.

    .jsonl .ndjson .json   one JSON object a line, or (.json) one array of objects
    .parquet               any table
    .csv .tsv              header in the first line, RFC 4180 quoting, every value a string
    .txt .md               one document a file, as {"text": ...}

Text is UTF-8, with or without a byte-order mark. Files are read in the order of their names, so that the same files
give the same rows on every machine.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data.faults import raise_at_once
from whet.errors import WhetError

Reader = Callable[[Path, str], Iterator["Row | WhetError"]]

GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class Row:
    """One record as it was read.

    source: the file, relative to the base folder where it lies inside it.
    line:   1-based line; the row's number in a Parquet file or a JSON array.
    """

    values: dict[str, Any]
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"


def read_rows(pattern: str, *, base: Path, on_error: Callable[[WhetError], None] = raise_at_once) -> Iterator[Row]:
    """Yields the rows of every file that matches `pattern`.

    pattern:  a path or a glob (`**` crosses folders), absolute or relative to `base`.
    on_error: called for each fault of a line or file, after which reading goes on; by default the first is raised.
    Raises WhetError when no file matches, or the folder cannot be searched.
    """
    try:
        files = _matching_files(pattern, base)
    except OSError as error:  # a folder that may not be entered, a name too long
        raise _cannot_open(pattern, error) from error
    for path, source in files:
        item: Row | WhetError | None = None
        for item in _read(path, source):
            if isinstance(item, WhetError):
                on_error(item)
            else:
                yield item
        if item is None:
            what = "the file has no rows" if path.stat().st_size else "the file is empty"
            on_error(WhetError(what, where=source, fix="remove it, or leave it out of the pattern"))


def _read(path: Path, source: str) -> Iterator[Row | WhetError]:
    """The rows of one file, and a fault in the place of each row that is not one."""
    try:
        yield from _reader_for(path, source)(path, source)
    except WhetError as error:
        yield error
    except OSError as error:
        yield _cannot_open(source, error)


def _matching_files(pattern: str, base: Path) -> list[tuple[Path, str]]:
    """(path to open, name to show) of the files that match, in the order of their names."""
    pattern = str(Path(os.path.expanduser(pattern)))
    # A file whose own name holds glob characters is meant literally.
    names = [pattern] if (base / pattern).is_file() else glob.glob(pattern, root_dir=base, recursive=True)
    found = sorted((Path(name).as_posix(), base / name) for name in names if (base / name).is_file())
    if not found:
        raise WhetError(f"no file matches {pattern!r} in {base}", where=pattern, fix=_near_matches(pattern, base))
    return [(path, name) for name, path in found]


def _near_matches(pattern: str, base: Path) -> str:
    """What to type instead of a pattern that matches nothing: the nearest names in the nearest folder that exists."""
    if (base / pattern).is_dir():
        return f"name the files in the folder, as {pattern.rstrip('/')}/*.jsonl"
    folder = base / pattern
    while not folder.is_dir() or any(character in str(folder) for character in GLOB_CHARACTERS):
        if folder == folder.parent:
            return "check the path"
        folder = folder.parent
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    wanted = (base / pattern).relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5) or names[:5]
    if not near:
        return f"the folder {folder} is empty; check the path"
    return f"check the path; {folder} holds {', '.join(near)}"


def _reader_for(path: Path, source: str) -> Reader:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise WhetError(
            f"cannot tell what kind of file {path.suffix or 'a name without extension'} is",
            where=source,
            fix=f"convert it to one of {', '.join(READERS)}, or narrow the pattern",
        )
    return reader


def _cannot_open(source: str, error: OSError) -> WhetError:
    if isinstance(error, PermissionError):
        return WhetError(
            "no permission to read the file",
            where=source,
            fix=f"chmod u+r {source}; the folders above it need u+rx",
        )
    return WhetError(
        f"cannot read the file: {error.strerror or error}", where=source, fix="check the path and the disk"
    )


# ---------------------------------------------------------------- text


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of each line. Lines end at \\n alone: U+2028 and the like belong to the text."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise WhetError(
                    f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
                    where=f"{source}:{number}",
                    fix=f"convert the file, as: iconv -f WINDOWS-1252 -t UTF-8 {source} > utf8{path.suffix}",
                ) from error


def _read_text(path: Path, source: str) -> Iterator[Row | WhetError]:
    text = "".join(line for _, line in _lines(path, source))
    if text.strip():
        yield Row({"text": text}, source, 1)


# ---------------------------------------------------------------- JSON


def _read_json_lines(path: Path, source: str) -> Iterator[Row | WhetError]:
    for number, line in _lines(path, source):
        if not line.strip():
            continue
        try:
            yield _json_row(_parse_json(line.rstrip("\r\n"), source, number), source, number)
        except WhetError as error:
            yield error


def _read_json(path: Path, source: str) -> Iterator[Row | WhetError]:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_json_lines(path, source)
        return
    array = _parse_json("".join(line for _, line in _lines(path, source)), source, 1)
    for number, value in enumerate(array, start=1):
        try:
            yield _json_row(value, source, number)
        except WhetError as error:
            yield error


def _parse_json(text: str, source: str, line: int) -> Any:
    """`line`: the number of the text's first line in the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise WhetError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=f"{source}:{line + error.lineno - 1}",
            fix="write one complete JSON object a line",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise WhetError(f"JSON that cannot be read: {error}", where=f"{source}:{line}", fix="remove the row") from error


def _json_row(value: Any, source: str, number: int) -> Row:
    if not isinstance(value, dict):
        raise WhetError(
            f"a row must be a JSON object, this one is {_json_kind(value)}",
            where=f"{source}:{number}",
            fix='write it as an object, as {"text": ...}',
        )
    return Row(value, source, number)


def _json_kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "an array"
    return "a string" if isinstance(value, str) else "a number"


# ---------------------------------------------------------------- CSV


def _read_csv(path: Path, source: str) -> Iterator[Row | WhetError]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # The file is decoded line by line so that a bad byte is reported with its line.
    reader = csv.reader((text for _, text in _lines(path, source)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            # A quoted field may span lines: a record's line is where it starts.
            line, start = start, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _checked_header(fields, f"{source}:{line}")
            elif len(fields) != len(header):
                yield _ragged(fields, header, f"{source}:{line}")
            else:
                yield Row(dict(zip(header, fields, strict=True)), source, line)
    except csv.Error as error:
        raise _csv_fault(error, f"{source}:{start}") from error


def _checked_header(names: list[str], where: str) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WhetError(f"column {twice[0]!r} appears twice", where=where, fix="give every column its own name")
    return names


def _ragged(fields: list[str], header: list[str], where: str) -> WhetError:
    return WhetError(
        f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})",
        where=where,
        fix='put "quotes" round fields that hold the delimiter or a line break',
    )


def _csv_fault(error: csv.Error, where: str) -> WhetError:
    if "field larger than field limit" in str(error):
        fix = "store documents this long as JSONL or Parquet"
    elif "new-line character" in str(error):
        fix = "end every line with a line feed; carriage returns alone are found in old files"
    else:
        fix = 'close the quotes of the record that starts here, and write a quote inside a field as ""'
    return WhetError(f"not valid CSV: {error}", where=where, fix=fix)


# ---------------------------------------------------------------- Parquet


def _read_parquet(path: Path, source: str) -> Iterator[Row | WhetError]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _checked_header(file.schema_arrow.names, source)
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, source, number)
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        # Arrow reports damaged pages as OSError without a number; one with a number is the file system's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise WhetError(
            f"not readable as Parquet: {str(error).splitlines()[0]}",
            where=source,  # whole batches fail, so the row is not known
            fix="write the file again; it may have been cut short or be of another kind",
        ) from error


READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
}
