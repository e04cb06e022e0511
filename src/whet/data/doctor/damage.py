"""Texts that were damaged on their way: wrong encodings, control characters, entities of HTML, nothing at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from whet.data.doctor.findings import Finding, Severity, by_share
from whet.data.doctor.rows import Row, is_blank

MANY = 0.005
"""Share of the rows from which entities are more than a note: text about web pages holds them rightly."""

REPLACED = re.compile("\ufffd")
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
ENTITIES = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|ndash|mdash|[lr][sd]quo|hellip|euro|#\d{2,5}|#x[0-9a-fA-F]{2,5});")

KINDS: tuple[tuple[str, re.Pattern[str], Severity | None, str, str], ...] = (
    (
        "unreadable bytes",
        REPLACED,
        "warning",
        "Texts with U+FFFD, which a program put where it could not read a byte. The character that was there is lost.",
        "Read the source again in its own encoding, or leave these rows out.",
    ),
    (
        "control characters",
        CONTROLS,
        "warning",
        "Texts with control characters, which no reader sees and the model learns to write.",
        "Remove them; whet prep does (data.clean).",
    ),
    (
        "HTML entities",
        ENTITIES,
        None,
        "Texts with entities of HTML such as &amp;, which the model learns to write.",
        "Unescape them if the texts came from web pages: whet prep with clean: {html: true}.",
    ),
)


def find_damage(rows: Sequence[Row]) -> Iterator[Finding]:
    yield from _mojibake(rows)
    for check, pattern, severity, what, advice in KINDS:
        hits = [(row, text, hit) for row in rows for text, hit in _first_hit(row, pattern)]
        if hits:
            places = tuple(row.place(text, hit.start(), hit.end()) for row, text, hit in hits)
            graded = severity or by_share(len(hits), len(rows), warning=MANY)
            yield Finding(check, graded, places, what, advice)
    blank = [row for row in rows if any(map(is_blank, row.answers)) or not row.said.strip()]
    if blank:
        yield Finding(
            "empty answers",
            "error",
            tuple(row.place() for row in blank),
            "Answers of nothing but spaces or invisible characters. The model learns to end its turn at once.",
            "Fill them in, or leave these rows out.",
        )


def _first_hit(row: Row, pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    for text in row.texts:
        if hit := pattern.search(text):
            yield text, hit
            return


def _mojibake(rows: Sequence[Row]) -> Iterator[Finding]:
    from ftfy.badness import BADNESS_RE

    hits = [
        (row, text, hit)
        for row in rows
        for text in row.texts
        if not text.isascii() and (hit := BADNESS_RE.search(text))
    ]
    first = {id(row): row.place(text, hit.start(), hit.end()) for row, text, hit in reversed(hits)}
    if first:
        yield Finding(
            "mojibake",
            "warning",
            tuple(reversed(first.values())),
            "Texts that look like UTF-8 read in another encoding, as â€™ for an apostrophe.",
            "Read the source as UTF-8, or mend the texts: whet prep does (data.clean).",
        )
