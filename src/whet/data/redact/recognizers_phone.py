"""Telephone and fax numbers, judged by Google's `phonenumbers`.

A number with a country code is one anywhere. A national number counts in the forms people write (groups, brackets,
dashes), and without them only near a word such as "Tel" or "call".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

from whet.data.redact.recognizers import OTHER_BEFORE, OTHER_NUMBER, Document, Span
from whet.data.redact.regions import check_regions

CANDIDATE = re.compile(
    r"(?<![0-9a-z.\-/_#=@+$])(?<![0-9][ ,])(?:\+|00|\(\+?|[0-9])(?:[ \-./()]{0,3}[0-9]){5,15}(?![0-9]|[\-./][0-9]{4})"
    r"(?P<extension>\s{0,2},?\s{0,2}(?:x|ext\.?|extension|durchwahl|dw|poste|"
    r"#)\s{0,2}[0-9]{1,6}(?![0-9]))?(?![0-9a-z@])"
)
LABEL = re.compile(
    r"(?<![a-z])(?:(?P<fax>(?:tele)?fax(?:nummer|nr|es)?|telecop(?:ie|ieur|ia)|facsimile)|"
    r"tel(?:\.|e?phone?|efon(?:nummer|nr|isch)?|efono|s)?|phones?|ph|mobile?s?|movil|cell(?:ular|phone)?|"
    r"handy(?:nummer)?|mobil(?:nummer|telefon|funk)?|portable|gsm|call(?:ed|ing|back)?|dial|text(?:ed)?|sms|whatsapp|"
    r"reach(?:able|ed)?|ring|rang|rufnummer|ruckruf|"
    r"anruf(?:en)?|erreich(?:en|bar)|joindre|joignable|appel(?:er|ez|e|le)?|rappel(?:er|ez)?|llam(?:ar|e|enos|ada|ado|"
    r"adas)|contact(?:o|ar|er|ez)?|"
    r"hotline|landline|pager|durchwahl|festnetz|kontakt|voicemail|beeper|(?:[tmp]|(?P<f>f)(?!\.))(?=\"?\s?[:.=\-]|"
    r"\s{1,2}\(?$)|tfno|tlfn?o?|tfn|mob|"
    r"home|work|office|fixe|fijo|emergency contact)(?![a-z])"
)
NANP = re.compile(r"(?:\+?1[ \-.]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ \-./])[2-9][0-9]{2}[ \-.][0-9]{4}")
EXTENSION = re.compile(r"\s{0,2},?\s{0,2}(?:x|ext\.?|extension|#)\s{0,2}[0-9]{1,6}$")
BLANKS_ONLY = re.compile("[0-9]{3} [0-9]{3} [0-9]{4}")
SEPARATORS = re.compile(r"[ \-./()]+")
DIGIT = re.compile("[0-9]")
NO_PHONE = re.compile(  # dates, prices, ZIP codes, IPv4 addresses and versions
    r"[0-9]{5}-[0-9]{4}|[0-9]{1,2}([/.\-])[0-9]{1,2}\1(?:[0-9]{2}|[0-9]{4})|(?:19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}|"
    r"[0-9]+\.[0-9]{1,2}|"
    r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
)
WINDOW = 44  # characters before a number in which a label counts
ADJACENT = 6  # characters between a label and a number that need not be valid


class Phones:
    """entity: PHONE; a number whose nearest label before it says fax is a FAX."""

    entity = "PHONE"

    def __init__(self, regions: Sequence[str]):
        self._regions = tuple(regions)
        for fault in check_regions(regions, "regions"):
            raise fault

    def find(self, document: Document) -> Iterator[Span]:
        if not document.has_digit:
            return
        for match in CANDIDATE.finditer(document.folded):
            before = document.before(match.start(), WINDOW)
            if OTHER_BEFORE.search(before) or NO_PHONE.fullmatch(match.group().strip("( )")):
                continue
            label = _label_in(before)
            score = self._score(match.group(), before, label)
            if score > 0:
                fax = label is not None and (label["fax"] or label["f"])
                yield Span(*_trimmed(document.folded, *match.span()), "FAX" if fax else "PHONE", score)

    def _score(self, value: str, before: str, label: re.Match[str] | None) -> float:
        groups = len(SEPARATORS.findall(value.strip()))
        if value.startswith(("+", "(+")) or (value.startswith("00") and groups):
            return 0.9 if _is_valid(value, self._regions) else 0.0 if label is None else 0.75
        adjacent = label is not None and len(before) - label.end() <= ADJACENT
        if NANP.fullmatch(EXTENSION.sub("", value)) and "US" in self._regions:
            return 0.83 if label or value[0] == "(" or not BLANKS_ONLY.fullmatch(value) else 0.55
        if label is not None:
            if _is_valid(value, self._regions):
                return 0.78 if groups or adjacent else 0.6
            return 0.75 if adjacent and groups and 7 <= len(DIGIT.findall(value)) <= 15 else 0.0
        grouped = groups >= (1 if value.startswith(("0", "(")) else 2)
        return 0.6 if grouped and _is_valid(value, self._regions) else 0.0


@lru_cache(maxsize=4096)
def _is_valid(value: str, regions: tuple[str, ...]) -> bool:
    """Valid as an international number, or in one of the regions, written with its trunk zero where it has one."""
    if value.startswith(("+", "(+")):
        return _is_number(value, None)
    if value.startswith("00"):
        return _is_number("+" + value[2:], None)
    zero = value.lstrip("( ").startswith("0")
    return any(_is_number(value, region) for region in regions if zero or not _has_trunk_zero(region))


def _is_number(value: str, region: str | None) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(value, region))
    except phonenumbers.NumberParseException:
        return False


@lru_cache
def _has_trunk_zero(region: str) -> bool:
    import phonenumbers

    return getattr(phonenumbers.PhoneMetadata.metadata_for_region(region), "national_prefix", None) == "0"


def _label_in(before: str) -> re.Match[str] | None:
    """The last label, unless the word for another kind of number, or another number, stands behind it."""
    last = None
    for last in LABEL.finditer(before):  # noqa: B007
        pass
    if last is None:
        return None
    between = before[last.end() :]
    return None if len(DIGIT.findall(between)) > 16 or OTHER_NUMBER.search(between) else last


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without a bracket that is never shut."""
    value = text[start:end]
    return (start + 1, end) if value.startswith("(") and ")" not in value else (start, end)
