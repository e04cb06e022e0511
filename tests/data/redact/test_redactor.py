"""Rows, redacted: nothing that was found is left, twice is once, and a vault brings all of it back.

By patterns, which find what they are told to, by patterns that Hypothesis makes up, and by the finder itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.redact.conftest import KEY, OTHER_KEY, PATTERNS, PatternFinder
from whet.data.redact.entities import ENTITIES
from whet.data.redact.find import Finder, Span
from whet.data.redact.policy import BUILT_IN, Policy, load_policy
from whet.data.redact.redactor import RedactedRow, Redactor
from whet.data.redact.replace import Mode, replaced
from whet.data.redact.vault import restore, seal, unseal
from whet.errors import WhetError

REPLACING: tuple[Mode, ...] = ("placeholder", "pseudonym", "mask", "generalise")
ROW = [
    "Dr. Ann Lee, born 1961-03-04 (92 years old), MRN 77-A12345, writes from ann.lee@acme.com.",
    "Ann Lee said: 77-A12345 is mine; call (212) 664-7665 or 10.20.30.40. ZIP 02139-4307, card 4111 1111 1111 1111.",
    "Nothing to see here.",
]


def policy(mode: Mode = "placeholder", **classes: Mode) -> Policy:
    return Policy(name="test", classes={**dict.fromkeys(PATTERNS, mode), **classes})


def by_patterns(
    mode: Mode = "placeholder", *, key: bytes | None = KEY, keep_originals: bool = False, **classes: Mode
) -> Redactor:
    return Redactor(policy(mode, **classes), key=key, keep_originals=keep_originals, finder=PatternFinder())


def every_class(mode: Mode) -> Policy:
    return Policy(name="all", classes=dict.fromkeys(ENTITIES, mode))


def test_a_row_by_placeholders():
    row = by_patterns(key=None).row(ROW)
    assert row.texts == [
        "Dr. [PERSON], born [DATE] ([AGE] years old), MRN [MRN], writes from [EMAIL].",
        "[PERSON] said: [MRN] is mine; call [PHONE] or [IP]. ZIP [ZIP], card [CARD].",
        "Nothing to see here.",
    ]
    assert row.counts == {
        "AGE": 1, "CARD": 1, "DATE": 1, "EMAIL": 1, "IP": 1, "MRN": 2, "PERSON": 2, "PHONE": 1, "ZIP": 1,
    }  # fmt: skip
    assert not row.dropped
    assert row.originals == {}


def test_a_row_by_coarser_values():
    row = by_patterns("generalise", key=None).row(ROW)
    assert row.texts[0].startswith("Dr. [PERSON], born 1961 (90 or older years old)")
    assert "10.20.30.0. ZIP 02100, card [CARD]" in row.texts[1]


def test_a_kept_class_is_not_looked_for_and_shields_nothing():
    """Catches `keep` for one class that leaves another's value in place."""
    row = by_patterns(IP="keep", EMAIL="keep").row(["10.20.30.40 ann@acme.com 219-09-9999"])
    assert row.texts == ["10.20.30.40 ann@acme.com [SSN]"]
    assert row.counts == {"SSN": 1}


def test_a_dropped_row_has_no_texts():
    row = by_patterns(SSN="drop", keep_originals=True).row([*ROW, "219-09-9999"])
    assert row.dropped
    assert row.texts == []
    assert row.originals == {}
    assert row.counts["SSN"] == 1
    assert row.counts["EMAIL"] == 1


def test_a_value_inside_another_word_stays_a_part_of_it():
    """Catches `Lee` that makes [PERSON]ds of Leeds, and a number that hides inside a longer one."""
    row = by_patterns().row(["Dr. Mark and MRN 123456", "Marketing, Mark, 9912345600"])
    assert row.texts == ["Dr. [PERSON] and MRN [MRN]", "Marketing, [PERSON], 99[MRN]00"]


def test_what_sticks_out_of_a_replacement_is_redacted():
    """Catches a value that hides behind a placeholder that the text came with."""
    finder = PatternFinder({"ADDRESS": r"at .*"})
    redactor = Redactor(Policy(name="test", classes={"ADDRESS": "placeholder"}), finder=finder)
    assert redactor.row(["at [PERSON] Main Street"]).texts == ["at [PERSON] [ADDRESS]"]


def test_what_a_replacement_uncovers_is_redacted():
    """Catches one pass too few."""
    finder = PatternFinder({"EMAIL": r"\S+@\S+", "PERSON": r"(?<=\0 )\w+"})
    redactor = Redactor(Policy(name="test", classes={"EMAIL": "placeholder", "PERSON": "placeholder"}), finder=finder)
    assert redactor.row(["a@b Smith"]).texts == ["[EMAIL] [PERSON]"]


def test_a_replacement_inside_a_word_is_known_again():
    """Catches a name that is glued to letters, taken for another name by each pass."""
    finder = PatternFinder({"PERSON": "Ann Le"})
    redactor = Redactor(Policy(name="test", classes={"PERSON": "pseudonym"}), key=KEY, finder=finder)
    assert redactor.row(["to Ann Lee"]).texts == ["to [PERSON]e"]


def test_a_network_beside_a_dot_is_known_again():
    """Catches a network that each pass makes another one."""
    assert by_patterns("generalise").row(["219-09-9999.10.1.2.3/16"]).texts == ["[SSN].10.1.2.0/16"]


def test_rows_have_one_name_for_one_person():
    first, second = (by_patterns("pseudonym").row([text]).texts[0] for text in ("Dr. Ann Lee.", "To Dr. Ann Lee!"))
    assert first.removeprefix("Dr. ").rstrip(".") == second.removeprefix("To Dr. ").rstrip("!")
    assert by_patterns("pseudonym", key=OTHER_KEY).row(["Dr. Ann Lee."]).texts != [first]


def test_the_repr_of_a_row_tells_nothing():
    row = by_patterns(keep_originals=True).row(ROW)
    assert "ann.lee" in str(row.originals)
    assert "ann.lee" not in repr(row)
    assert "Nothing" not in repr(row)


def test_pseudonyms_without_a_key_are_refused():
    with pytest.raises(WhetError, match="without a key"):
        by_patterns("pseudonym", key=None)
    with pytest.raises(WhetError, match="a vault"):
        by_patterns("placeholder", key=None, keep_originals=True)


def test_an_empty_row_is_itself():
    assert by_patterns().row([]) == RedactedRow([], {})
    assert by_patterns().row(["", ""]) == RedactedRow(["", ""], {})


# properties, with what the patterns find

NUMBERS = ["219-09-9999", "4111 1111 1111 1111", "(212) 664-7665", "10.1.2.3", "2021-03-04", "1947-01-01", "02139"]
OTHERS = [
    "ann@acme.com",
    "b.c@d.org",
    "03601-1234",
    "MRN 12345678",
    "12345678",
    "Dr. Ann Lee",
    "Ann Lee",
    "97 years old",
]
LIKE_REPLACEMENTS = ["[EMAIL]", "[#aaaaaaaaaaaa]", "****", "Dr. ", "MRN ", "Port ", "ZZ00", "255.255.255.255"]
PIECES = st.sampled_from([*NUMBERS, *OTHERS, *LIKE_REPLACEMENTS])
GLUE = st.sampled_from([" ", "", ", ", "\n", "-", ".", "/", " and "])
TEXTS = st.lists(st.lists(st.tuples(PIECES | st.text(max_size=5), GLUE), max_size=6), min_size=1, max_size=3).map(
    lambda rows: ["".join(piece + glue for piece, glue in row) for row in rows]
)


def left_over(finder: PatternFinder | Finder, before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Values that were found in a row, outside what had been replaced already, and stand in it still, as words."""
    values = set()
    for text, spans in zip(before, finder.find(before), strict=True):
        taken = replaced(text)
        values |= {
            text[span.start : span.end]
            for span in spans
            if span.end - span.start >= 4 and all(end <= span.start or start >= span.end for start, end in taken)
        }
    free = [_without(text, replaced(text)) for text in after]
    return [value for value in values if any(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) for text in free)]


def _without(text: str, taken: Sequence[tuple[int, int]]) -> str:
    for start, end in reversed(taken):
        text = text[:start] + "\0" * (end - start) + text[end:]
    return text


@example(["219-09-9999 Dr. Ann Lee Ann Lee219-09-9999"], "placeholder")
@given(TEXTS, st.sampled_from(["placeholder", "pseudonym", "mask"]))
def test_nothing_found_is_left(texts: list[str], mode: Mode):
    assert left_over(PatternFinder(), texts, by_patterns(mode).row(texts).texts) == []


@given(TEXTS, st.sampled_from(REPLACING), st.booleans())
def test_redacting_twice_is_redacting_once(texts: list[str], mode: Mode, keep: bool):
    once = by_patterns(mode, keep_originals=keep).row(texts)
    twice = by_patterns(mode, keep_originals=keep).row(once.texts)
    assert twice.texts == once.texts
    assert twice.originals == {}


@given(TEXTS, st.sampled_from(REPLACING))
def test_the_vault_brings_every_letter_back(texts: list[str], mode: Mode):
    row = by_patterns(mode, keep_originals=True).row(texts)
    assert restore(row.texts, unseal(seal(row.originals, KEY), KEY)) == texts


@given(TEXTS, st.sampled_from(REPLACING))
def test_a_row_does_not_rest_on_the_rows_before(texts: list[str], mode: Mode):
    """Catches state and caches that change results."""
    used = by_patterns(mode)
    used.row(ROW)
    assert used.row(texts) == used.row(texts) == by_patterns(mode).row(texts)


@st.composite
def arbitrary_finders(draw: st.DrawFn) -> PatternFinder:
    """Finders of any words, also of those that replacements are made of."""
    words = st.text(st.sampled_from("ab1 .-[]*#EMAIL"), min_size=1, max_size=6)
    found = draw(st.dictionaries(st.sampled_from(sorted(PATTERNS)), words, max_size=4))
    return PatternFinder({entity: re.escape(word) for entity, word in found.items()})


@given(arbitrary_finders(), st.lists(st.text(st.sampled_from("ab1 .-[]*#EMAIL"), max_size=30), max_size=3), st.data())
@settings(max_examples=200)
def test_whatever_the_finder_finds(finder: PatternFinder, texts: list[str], data: st.DataObject):
    mode: Mode = data.draw(st.sampled_from(REPLACING))
    redactor = Redactor(policy(mode), key=KEY, keep_originals=True, finder=finder)
    row = redactor.row(texts)
    assert redactor.row(row.texts).texts == row.texts
    assert restore(row.texts, row.originals) == texts


# with the finder itself

LETTER = [
    "Dear Dr. Helen Ashworth,\nPatient: John Q. Public, DOB: 03/14/1957, MRN: 4839201, SSN 219-09-9999.",
    "Phone: (212) 664-7665, fax 212-664-7666, mail john.public@hospital.example.com, http://portal.acme.com/u/4839201",
    "IBAN DE89 3704 0044 0532 0130 00; card 4111 1111 1111 1111; VIN 1HGCM82633A004352; from 192.168.17.4",
    "John Q. Public (MRN 4839201) lives at 12 Main Street, Springfield, IL 62704.",
]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("keep", [False, True])
def test_a_letter_under_each_policy(name: str, keep: bool, tmp_path: Path):
    """Catches a finder that takes a replacement for a value, and a policy that the redactor cannot apply."""
    redactor = Redactor(load_policy(name, tmp_path), key=KEY, keep_originals=keep)
    row = redactor.row(LETTER)
    for value in ("219-09-9999", "664-7665", "john.public@", "4839201", "DE89", "4111 1111 1111", "192.168.17.4"):
        assert not any(value in text for text in row.texts)
    assert redactor.row(row.texts).texts == row.texts
    if keep:
        assert restore(row.texts, row.originals) == LETTER


@pytest.mark.parametrize("mode", REPLACING)
def test_nothing_that_the_finder_finds_is_left(mode: Mode):
    redactor, finder = Redactor(every_class(mode), key=KEY), Finder(ENTITIES)
    row = redactor.row(LETTER)
    if mode != "generalise":
        assert left_over(finder, LETTER, row.texts) == []
    assert redactor.row(row.texts).texts == row.texts


@pytest.fixture(scope="module")
def redactors() -> dict[Mode, Redactor]:
    return {mode: Redactor(every_class(mode), key=KEY, keep_originals=True) for mode in REPLACING}


@given(texts=TEXTS, mode=st.sampled_from(REPLACING))
@settings(deadline=None)
def test_the_finder_leaves_replacements_alone(redactors: dict[Mode, Redactor], texts: list[str], mode: Mode):
    row = redactors[mode].row(texts)
    assert redactors[mode].row(row.texts).texts == row.texts
    assert restore(row.texts, row.originals) == texts


def test_a_policy_s_regions_decide_whose_numbers_are_read():
    text = "wir sagen 044 668 18 00"
    for regions, new in ((("CH",), "wir sagen [PHONE]"), (("US",), text)):
        redactor = Redactor(Policy(name="test", classes={"PHONE": "placeholder"}, regions=regions))
        assert redactor.row([text]).texts == [new]


def test_a_label_says_what_a_text_is_and_stays():
    """Catches values of JSON that are looked at without their keys, and offsets that count the label."""
    redactor = Redactor(every_class("placeholder"))
    assert redactor.row(["77-A12345", "x 77-A12345"], [None, None]).texts == ["77-A12345", "x 77-A12345"]
    assert redactor.row(["77-A12345", "x 77-A12345"], ["mrn", None]).texts == ["[MRN]", "x [MRN]"]
    assert redactor.row(["Ann Lee"], ["patientName"]).texts == ["[PERSON]"]
    row = redactor.row(["hello"], ["ann@example.org"])
    assert (row.texts, row.counts) == (["hello"], {})


def test_what_is_not_covered_is_told():
    """Catches a report that is silent about names when there is no model for them."""
    assert "PERSON" in Redactor(every_class("placeholder")).not_covered


class CountingFinder:
    not_covered: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.calls = 0

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        self.calls += 1
        return [[] for _ in texts]


def test_a_row_without_personal_data_is_searched_once():
    """Catches a second search of every row, half of the time that redaction takes."""
    finder = CountingFinder()
    Redactor(policy(), finder=finder).row(["plain", "text"])
    assert finder.calls == 1


PROGRAM = """
import sys
from whet.data.redact.policy import Policy
from whet.data.redact.redactor import Redactor
from whet.data.redact.entities import ENTITIES
redactor = Redactor(Policy(name="all", classes=dict.fromkeys(ENTITIES, "pseudonym")), key=bytes(range(32)),
                    keep_originals=True)
row = redactor.row(sys.argv[1:])
print(repr(row.texts), row.counts, row.originals)
"""


def test_another_process_gives_the_same_row():
    """Catches a result that rests on hash(), on the order of a set, or on what the process did before."""
    row = Redactor(every_class("pseudonym"), key=KEY, keep_originals=True).row(LETTER)
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *LETTER],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "4242")
    }
    assert outputs == {f"{row.texts!r} {row.counts} {row.originals}\n"}
