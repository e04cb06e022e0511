"""The modes on given values; no finder takes part."""

from __future__ import annotations

import ipaddress
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.redact.conftest import KEY, OTHER_KEY
from whet.data.redact.entities import ENTITIES
from whet.data.redact.keys import derive
from whet.data.redact.marks import MARK
from whet.data.redact.pseudonyms import BACKS, FRONTS, GIVEN, normalise, pseudonym, substitutes
from whet.data.redact.replace import RESTRICTED_ZIPS, Replacer, generalise, mask, replaced
from whet.errors import WhetError

CLASSES = st.sampled_from(sorted(ENTITIES))
VALUES = st.one_of(st.text(min_size=1, max_size=40), st.from_regex(r"[0-9A-Z -]{1,20}", fullmatch=True))
MODES = st.sampled_from(["placeholder", "pseudonym", "mask", "generalise"])


def valid_luhn(text: str) -> bool:
    digits = [int(d) for d in text if d.isdigit()]
    doubled = [d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def test_the_luhn_of_this_file_is_right():
    assert valid_luhn("4111 1111 1111 1111")
    assert not valid_luhn("4111 1111 1111 1112")


def test_placeholders_name_the_class():
    assert Replacer({"EMAIL": "placeholder"}).replacement("EMAIL", "ann@acme.com") == "[EMAIL]"


@pytest.mark.parametrize("modes", [{"EMAIL": "pseudonym"}, {"EMAIL": "placeholder"}])
def test_pseudonyms_and_marks_need_a_key(modes: dict[str, str]):
    with pytest.raises(WhetError, match="without a key"):
        Replacer(modes, marks=modes["EMAIL"] == "placeholder")  # type: ignore[arg-type]


def test_the_lists_of_words_hold_what_their_indices_reach():
    """Catches an IndexError at one value in a million, and words said twice."""
    assert (len(set(GIVEN)), len(set(FRONTS)), len(set(BACKS))) == (128, 64, 64)


@pytest.mark.parametrize(
    ("entity", "first", "second"),
    [
        ("PERSON", "John Smith", "JOHN  SMITH"),
        ("PERSON", "John Smith", "john\nsmith"),
        ("PERSON", "John Smith", "Smith, John"),
        ("PERSON", "Zoë Müller", "Zoe\u0308 Mu\u0308ller"),
        ("EMAIL", "Ann.Lee@Acme.com", "ann.lee@acme.COM"),
        ("PHONE", "(212) 664-7665", "212.664.7665"),
        ("PHONE", "(212) 664-7665", "+1 212 664 7665"),
        ("PHONE", "+49 30 901820", "0049 (30) 90 18 20"),
        ("SSN", "219-09-9999", "219 09 9999"),
        ("IBAN", "DE89 3704 0044 0532 0130 00", "de89370400440532013000"),
        ("ADDRESS", "12 Main St., Apt 4", "12 MAIN ST APT 4"),
    ],
)
def test_ways_to_write_a_value_share_its_substitute(entity: str, first: str, second: str):
    assert pseudonym(entity, first, KEY) == pseudonym(entity, second, KEY)


@pytest.mark.parametrize(
    ("entity", "first", "second"),
    [
        ("PERSON", "Ann Lee", "Anna Lee"),
        ("EMAIL", "a.b@acme.com", "ab@acme.com"),
        ("IP", "10.1.21.3", "10.12.1.3"),
        ("PHONE", "212 664 7665", "212 664 7666"),
        ("CARD", "****", "----"),
    ],
)
def test_other_values_have_other_substitutes(entity: str, first: str, second: str):
    assert pseudonym(entity, first, KEY) != pseudonym(entity, second, KEY)


def test_a_class_is_part_of_what_is_hashed():
    """Catches a fax number that tells its owner's telephone number."""
    assert pseudonym("PHONE", "212 664 7665", KEY) != pseudonym("FAX", "212 664 7665", KEY)


FROZEN: dict[tuple[str, str], str] = {
    ("PERSON", "Ann Lee"): "Riley Ashenglen-Fennelgarth",
    ("PERSON", "Lee"): "Brambleslade-Dalengarth",
    ("LOCATION", "Springfield"): "Port Elderreach-Birchenlaw",
    ("ADDRESS", "12 Main St"): "632 Brackenwick-Sablestrand Street",
    ("PHONE", "(212) 664-7665"): "+1-795-555-0166 x37750",
    ("EMAIL", "ann.lee@acme.com"): "user-psyih76ua6qd@example.org",
    ("URL", "http://acme.com/ann"): "https://example.org/6amsqs3ahafo",
    ("IP", "10.20.30.40"): "243.205.125.43",
    ("IP", "fe80::1"): "2001:db8:c1be:6bd8:6d93:e5b7:14d1:536a",
    ("SSN", "219-09-9999"): "965-01-6958",
    ("CARD", "4111 1111 1111 1111"): "0000 1374 2647 2222",
    ("IBAN", "DE89 3704 0044 0532 0130 00"): "ZZ00 Z3KM XLSH LCJX",
    ("VIN", "1HGCM82633A004352"): "0ZZ3YDDRC69YURWNF",
    ("MRN", "77-A12345"): "MRN-miyawoas4ekb",
}


def test_substitutes_stay_as_they_are():
    """Catches a change that would give everybody another name in the next version of a data set."""
    key = derive(KEY, "whet pseudonyms 1")
    assert [pseudonym(entity, value, key) for entity, value in FROZEN] == list(FROZEN.values())


@given(CLASSES, VALUES)
def test_a_substitute_rests_on_key_class_and_normalised_value_alone(entity: str, value: str):
    """Catches state between calls, and a value that is hashed as it is written."""
    modes = {entity: "pseudonym"}
    one = Replacer(modes, key=KEY)  # type: ignore[arg-type]
    one.replacement(entity, value + "x")
    other = Replacer(modes, key=KEY)  # type: ignore[arg-type]
    assert one.replacement(entity, value) == other.replacement(entity, value)
    assert normalise(entity, value) == normalise(entity, value.casefold() + " ")
    assert other.replacement(entity, value) == other.replacement(entity, value.casefold() + " ")


@given(CLASSES, VALUES)
def test_another_key_gives_another_substitute(entity: str, value: str):
    assert pseudonym(entity, value, KEY) != pseudonym(entity, value, OTHER_KEY)


@given(CLASSES, VALUES)
def test_every_substitute_is_known_again_from_end_to_end(entity: str, value: str):
    """Catches a substitute that the next pass would redact once more."""
    new = pseudonym(entity, value, KEY)
    assert (0, len(new)) in substitutes(new)
    assert replaced(f"so: {new}, yes") == [(4, 4 + len(new))]


@given(CLASSES, MODES, VALUES)
def test_every_marked_replacement_is_known_again(entity: str, mode: str, value: str):
    replacer = Replacer({entity: mode}, key=KEY, marks=True)  # type: ignore[dict-item]
    new = replacer.replacement(entity, value)
    if new != value:
        assert MARK.search(new)
        assert replaced(f"so: {new}, yes")[-1][1] == 4 + len(new)
        assert replaced(f"so: {new}, yes")[0][0] == 4


@given(VALUES, VALUES)
def test_marks_tell_two_spellings_apart(first: str, second: str):
    """Catches a vault that gives back `john smith` for `John Smith`."""
    replacement = Replacer({"PERSON": "pseudonym"}, key=KEY, marks=True).replacement
    assert (replacement("PERSON", first) == replacement("PERSON", second)) == (first == second)


@given(VALUES)
def test_substitutes_are_nobodys(value: str):
    """Catches a card that passes Luhn, an SSN that is issued, a number or address that rings somewhere."""
    assert not valid_luhn(pseudonym("CARD", value, KEY))
    area, group, serial = pseudonym("SSN", value, KEY).split("-")
    assert area >= "900"
    assert int(group) < 50
    assert len(serial) == 4
    assert re.fullmatch(r"\+1-[2-9]\d\d-555-01\d\d x\d{5}", pseudonym("PHONE", value, KEY))
    assert pseudonym("EMAIL", value, KEY).endswith("@example.org")
    assert pseudonym("IBAN", value, KEY).startswith("ZZ00")
    address = ipaddress.ip_address(pseudonym("IP", value, KEY))
    assert address.is_reserved or address in ipaddress.ip_network("2001:db8::/32")


def test_a_hundred_thousand_people_hardly_share_names():
    """Catches digits of the hash that are thrown away: of 2**31 names, 2.3 pairs are expected to meet."""
    names = {pseudonym("PERSON", f"person {i}", KEY) for i in range(100_000)}
    assert len(names) >= 100_000 - 12


def test_one_word_becomes_a_surname():
    assert " " not in pseudonym("PERSON", "Smith", KEY)
    assert pseudonym("PERSON", "Ann Smith", KEY).split()[0] in GIVEN


@pytest.mark.parametrize(
    ("entity", "value", "masked"),
    [
        ("CARD", "4111 1111 1111 1234", "****1234"),
        ("IBAN", "DE89 3704 0044 0532 0130 00", "****3000"),
        ("PHONE", "(212) 664-7665", "****65"),
        ("PHONE", "664 766", "****"),
        ("CARD", "1234", "****"),
        ("SSN", "219-09-9999", "****"),
        ("PERSON", "Ann Lee", "****"),
        ("API_KEY", "sk-abcdefghijklmnopqrst", "****"),
    ],
)
def test_mask_shows_the_end_only_where_it_is_safe(entity: str, value: str, masked: str):
    assert mask(entity, value) == masked


@pytest.mark.parametrize(
    ("entity", "value", "coarser"),
    [
        ("DATE", "2021-03-04", "2021"),
        ("DATE", "4 March 2021, 10:30", "2021"),
        ("DATE", "March 4th", "[DATE]"),
        ("DATE", "03/04/21", "[DATE]"),
        ("DATE", "2021-12-30 to 2022-01-02", "[DATE]"),
        ("DATE", "20210304", "[DATE]"),
        ("DATE", "4 March 1931", "[DATE]"),
        ("ZIP", "02139", "02100"),
        ("ZIP", "02139-4307", "02100"),
        ("ZIP", "03601", "000"),
        ("ZIP", "02100", "02100"),
        ("ZIP", "000", "000"),
        ("ZIP", "SW1A 1AA", "[ZIP]"),
        ("AGE", "92", "90 or older"),
        ("AGE", "104-year-old", "90 or older"),
        ("AGE", "89", "89"),
        ("AGE", "ninety-two", "[AGE]"),
        ("IP", "192.168.17.4", "192.168.17.0"),
        ("IP", "10.0.0.0/8", "10.0.0.0"),
        ("IP", "2001:db8:1:2::7", "2001:db8:1::"),
        ("IP", "999.1.1.1", "[IP]"),
        ("EMAIL", "ann@acme.com", "[EMAIL]"),
    ],
)
def test_generalise(entity: str, value: str, coarser: str):
    assert generalise(entity, value) == coarser


def test_the_restricted_zips_are_the_seventeen_of_the_guidance():
    assert len(RESTRICTED_ZIPS) == 17
    assert all(generalise("ZIP", f"{zip3}99") == "000" for zip3 in RESTRICTED_ZIPS)


@given(st.sampled_from(["DATE", "ZIP", "AGE", "IP"]), VALUES)
def test_generalising_twice_is_generalising_once(entity: str, value: str):
    once = generalise(entity, value)
    assert replaced(once) or generalise(entity, once) == once


@pytest.mark.parametrize(
    "text",
    [
        "ES79 0000 1234 5678 9012 3456",
        "Jane Smith-Jones",
        "00012345678901234",
        "192.168.0.1",
        "212-34-5678",
        "user@example.org",
        "[NOTE]",
        "Ann Lee [illustration]",
    ],
)
def test_real_values_do_not_pass_for_replacements(text: str):
    """Catches a value that goes unredacted since it looks like a substitute."""
    assert replaced(text) == []


def test_nothing_tells_the_key():
    replacer = Replacer({"EMAIL": "pseudonym"}, key=KEY)
    assert KEY.hex() not in repr(replacer)
    assert repr(KEY) not in repr(replacer)
