"""What holds for any text: spans lie inside, sorted, apart; nothing crashes; hostile texts end."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whet.data.redact.entities import ENTITIES
from whet.data.redact.find import Finder

FINDER = Finder(ENTITIES)
PIECES = [
    "Tel. ", "+49 30 ", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "jo@example.org", "https://", "www.",
    "12.03.2024", "3 May", "(01)",
    "MRN: ", "account no ", "Dear ", "Dr. ", "Müller", "\n", " ", "12 Main St", "10115 Berlin",
    "-----BEGIN PRIVATE KEY-----", "CUI//", "aged 95", "İ", "🙂",
    "::", "a.b.c.d", "123-45-6789", "SSN ", ",", "(", "password=", "x9K2m4Qz81Lp",
]  # fmt: skip
TEXTS = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=20).map("".join))


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=3))
@example(["\x00", "", "　"])
def test_spans_lie_inside_sorted_and_apart(texts):
    found = FINDER.find(texts)
    assert len(found) == len(texts)
    for text, spans in zip(texts, found, strict=True):
        end = 0
        for span in spans:
            assert end <= span.start < span.end <= len(text)
            assert span.entity in ENTITIES
            end = span.end
    assert FINDER.find(texts) == found


PROSE = st.text("abcdefghij \n", max_size=40)
VALUES = {
    "CARD": "4111 1111 1111 1111", "IBAN": "GB29 NWBK 6016 1331 9268 19", "VIN": "1M8GDM9AXKP042788",
    "TAX_ID": "12345678Z",
    "EMAIL": "jo@example.org", "SSN": "123-45-6789", "API_KEY": "AKIAIOSFODNN7EXAMPLE", "CONTRACT": "W912HN-21-C-0001",
}  # fmt: skip


@settings(deadline=None)
@given(PROSE, PROSE, st.sampled_from(sorted(VALUES)))
def test_prose_around_does_not_lose_a_value(before, after, entity):
    value = VALUES[entity]
    text = f"{before} {value} {after}"
    start = len(before) + 1
    covered = {place for span in FINDER.find([text])[0] for place in range(span.start, span.end)}
    assert set(range(start, start + len(value))) <= covered | {
        start + place for place, c in enumerate(value) if c == " "
    }


LENGTH = 100_000
HOSTILE = {
    "one letter": "a", "capitals": "A", "one digit": "1", "blanks": " ", "newlines": "\n", "dots": ".", "dashes": "-",
    "at signs": "a@", "domains": "a.",
    "colons": "a:", "hex": "af:", "octets": "1.1.", "zeros and blanks": "0 ", "plus": "+1 ", "brackets": "(1",
    "words": "Aa ", "street words": "1 Aa ",
    "labels": "account number ", "labels with dots": "no. ", "names": "Dear Aa ", "dates": "1 May ", "slashes": "1/1/",
    "schemes": "http://a", "begin": "-----BEGIN PRIVATE KEY",
    "banner": "CUI//A", "token": "token=", "key": "key key ", "iban": "DE89 ", "iban long": "DE891",
    "rue": "1 rue de la ", "calle": "calle de la ", "underscores": "a_", "card": "4111 ",
    "jwt": "eyJa.", "weekday": "monday ", "month": "may ", "mixed": "A1", "quotes": '"a": ',
    "url tail": "http://a.de/" + ")" * 50, "digits and dashes": "1-", "ages": "95 ans ", "german": "Aastr ",
    "titles": "Dr. ",
}  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_end(piece):
    """Catches a pattern whose time grows with the square of the text: 100 KB would then take minutes or more."""
    text = (piece * (LENGTH // len(piece) + 1))[:LENGTH]
    for spans in FINDER.find([text, text[:1000] + "!"]):
        assert all(span.end <= LENGTH for span in spans)
