"""Which languages the rows are in, and whether answers keep to the question's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from whet.data.doctor.findings import Finding, Place
from whet.data.doctor.rows import Row
from whet.data.report.statistics import NO_LANGUAGE, UNSURE, language

SAMPLE = 1024
"""Rows that are looked at: those with the smallest ids, so that no order of files changes them."""

LONG = 60
"""Characters from which a text's language can be told."""

ENOUGH = 20
OTHER = 0.02
"""Share of the sample from which a second language is told."""

SWITCHED = 0.05


def find_languages(rows: Sequence[Row]) -> Iterator[Finding]:
    chosen = {id(row) for row in sorted(rows, key=lambda row: (row.example.id, row.where))[:SAMPLE]}
    sample = [row for row in rows if id(row) in chosen]
    told = [(row, code) for row in sample if (code := _told(row.answer or "") or _told(row.said)) is not None]
    if len(told) < ENOUGH:
        return
    counts = Counter(code for _, code in told)
    main, most = max(counts.items(), key=lambda item: (item[1], item[0]))
    if most <= (1 - OTHER) * len(told):
        shares = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
        said = ", ".join(f"{code} {count / len(told):.0%}" for code, count in shares)
        places = tuple(row.place(row.answer or row.said, detail=code) for row, code in told if code != main)
        what = f"Rows in several languages: {said}, of {len(told):,} whose language could be told."
        yield Finding("language mix", "note", places, what, "If it is not meant, leave the others out.")
    yield from _switches([row for row, _ in told])


def _switches(rows: Sequence[Row]) -> Iterator[Finding]:
    asked = [(row, _told(row.question or ""), _told(row.answer or "")) for row in rows]
    both = [(row, question, answer) for row, question, answer in asked if question and answer]
    found: list[Place] = [
        row.place(row.answer or "", detail=f"{question} to {answer}")
        for row, question, answer in both
        if question != answer
    ]
    if found and len(found) >= SWITCHED * len(both):
        what = f"Answers in another language than their question, {len(found) / len(both):.0%} of those looked at."
        yield Finding("language switches", "note", tuple(found), what, "Right for translation; else leave these out.")


def _told(text: str) -> str | None:
    code = language(text) if len(text) >= LONG else UNSURE
    return None if code in (UNSURE, NO_LANGUAGE) else code
