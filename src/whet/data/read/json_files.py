"""JSON: one object a line, or one array of objects.

The standard library's parser: orjson is twice as fast (315 against 150 MB/s a core), but turns integers beyond 64 bits
into floats and refuses NaN, so the same file would give other rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from whet.data.read.piece import BYTE_ORDER_MARK, Piece, Row, decoded, lines, opened, raised, whole_text
from whet.errors import WhetError


def read_json_lines(piece: Piece) -> Iterator[Row | WhetError]:
    """Lines of white space (ASCII's) are no rows."""
    with opened(piece) as file:
        for number, raw in lines(file, piece):
            try:
                if (raw := raised(raw)).strip():
                    line = decoded(raw, piece, number).rstrip("\r\n")
                    yield _row(_parse(line, piece.source, number), piece.source, number)
            except WhetError as error:
                yield error


def read_json(piece: Piece) -> Iterator[Row | WhetError]:
    with opened(piece) as file:
        start = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        yield from read_json_lines(piece)
        return
    for number, value in enumerate(_parse(whole_text(piece), piece.source, 1), start=1):
        try:
            yield _row(value, piece.source, number)
        except WhetError as error:
            yield error


def _parse(text: str, source: str, line: int) -> Any:
    """`line`: the number of the text's first line in the file."""
    try:
        value = json.loads(text)
        return _whole_characters(value) if "\\ud" in text or "\\uD" in text else value
    except json.JSONDecodeError as error:
        raise WhetError(
            f"not JSON: {error.msg} at column {error.colno}",
            where=f"{source}:{line + error.lineno - 1}",
            fix="write one complete JSON object a line",
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise WhetError(f"JSON that cannot be read: {error}", where=f"{source}:{line}", fix="remove the row") from error


def _whole_characters(value: Any) -> Any:
    """The value with U+FFFD for half a surrogate pair, as JavaScript cuts emoji: nothing could write it as UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def _row(value: Any, source: str, number: int) -> Row:
    if not isinstance(value, dict):
        raise WhetError(
            f"a row must be a JSON object, this one is {_kind(value)}",
            where=f"{source}:{number}",
            fix='write it as an object, as {"text": ...}',
        )
    return Row(value, source, number)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "an array"
    return "a string" if isinstance(value, str) else "a number"
