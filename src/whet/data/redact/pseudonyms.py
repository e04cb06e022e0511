"""Substitutes that look like what they stand for and never are anyone's.

    substitute = form(HMAC-SHA256(key, class + NUL + normalised value))

It rests on key, class and normalised value alone, so one person has one name in every row, file and run. Every form is
one that is not given out: reserved by its registry, or of invented words. `substitutes` knows them all again.

How many there are, as powers of two, and hence after about how many distinct values two of them share a substitute:
names, places, streets 31 bits (46,000), telephones 32 (77,000), SSN 25 (7,000), IPv4 28 (16,000), the others 40 or more
(a million). Sharing one blurs two values; it undoes nothing, and the vault does not rest on it.
"""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Iterator

from whet.data.redact.entities import ENTITIES
from whet.data.redact.marks import TAG, tag

# 128, 64 and 64 words. A change to one of them, or to their order, gives everybody another name.
_GIVEN = """
Adel Addison Adrian Ainsley Akira Alex Amari Amal Andrea Angel Ari Ariel Ash Aspen Aubrey Avery Bailey Bao Bellamy
Blair Blake Bobbie Briar Brook Cameron Campbell Carmen Casey Charlie Chidi Chris Cleo Cody Corey Cruz Dakota Dale Dana
Dani Darcy Deniz Devon Dominique Drew Eden Eliot Ellis Emerson Emery Esme Evren Fabian Farah Finley Frances Frankie
Gale Gray Hadley Haru Harley Harper Hayden Hayley Hollis Indigo Izumi Jackie Jaden Jamie Jan Jay Jean Jess Jo Jordan
Jules Kai Kelly Kerry Kim Kiran Kit Kyle Lane Laurie Lee Lennon Leslie Lin Logan Lou Luca Lynn Marley Max Mika Minh
Morgan Nico Nikita Noor Oakley Ocean Parker Pat Peyton Phoenix Quinn Ravi Reese Remy Riley Robin Rory Rowan Sage Sam
Sasha Shay Skyler Sol Tai Taylor Toni Wren Yuki Zuri
"""
_FRONTS = """
Alder Amber Arden Ashen Balder Barrow Beren Birchen Bracken Bramble Brinder Calder Carden Cinder Clover Corran Dalen
Darrow Delver Dunner Elder Elmen Ember Fallow Farren Fennel Ferren Galder Garrow Glenner Gorsen Hallow Harren Hazel
Heather Hollen Ivern Jarrow Kelder Kestrel Larken Laurel Linden Lorren Marren Merrow Morren Nettle Norren Oaken Orren
Peller Quarren Rowan Sable Sorrel Tallow Tarren Thistle Umber Velder Wander Willow Yarrow
"""
_BACKS = """
acre bank beck bourne bridge brook burn cairn cliff combe cote crest croft dale dell down edge fell fen field firth ford
garth gate glade glen grange grove hall ham haven heath hill holme holt hurst knoll land law lea ley loch lock mead mere
mont moor mouth pool reach ridge rise shaw side slade stead stoke stow strand thorpe thwaite vale water wick
"""
GIVEN, FRONTS, BACKS = _GIVEN.split(), _FRONTS.split(), _BACKS.split()

_SURNAME = re.compile("(?:{0})(?:{1})-(?:{0})(?:{1})".format("|".join(FRONTS), "|".join(BACKS)))
_NAMED = re.compile(r"(?:\b([A-Z][a-z]+|[0-9]{1,3}) )?\b([A-Z][a-z]+-[A-Z][a-z]+)\b(?: Street\b)?")
_HYPHENATED = re.compile(r"-(?<=[a-z]-)[A-Z]")
_BEFORE_SURNAME = frozenset([*GIVEN, "Port"])
_SHAPES = tuple(
    (sign, re.compile(pattern))
    for sign, pattern in (
        ("-555-01", r"\+1-[2-9][0-9]{2}-555-01[0-9]{2} x[0-9]{5}(?![0-9])"),
        ("@example.org", rf"\buser-{TAG}@example\.org\b"),
        ("//example.org/", rf"\bhttps://example\.org/{TAG}\b"),
        (".", r"2(?<![0-9]2)(?<![0-9]\.2)(?:4[0-9]|50)(?:\.[0-9]{1,3}){3}(?!\.?[0-9])"),
        ("2001:db8:", r"2001(?<![\w:]2001):db8(?::[0-9a-f]{4}){6}(?![\w:])"),
        ("-", r"9(?<![0-9]9)(?<![0-9]-9)[0-9]{2}-[0-4][0-9]-[0-9]{4}(?!-?[0-9])"),
        ("0000 ", r"0000(?<![0-9]0000)(?<![0-9] 0000)(?: [0-9]{4}){3}(?! ?[0-9])"),
        ("ZZ00 ", r"\bZZ00(?: [A-Z2-7]{4}){3}\b"),
        ("0ZZ", r"\b0ZZ[A-HJ-NPR-Z0-9]{14}\b"),
    )
)
"""(what a text has that holds such a substitute, its form). The signs are looked for first, since that is fast; and a
form starts with what it starts with, its look-behind after that, since Python's `re` then skips to it."""
_CODE = re.compile(rf"\b([A-Z][A-Z_]+)-{TAG}\b")
VIN_LETTERS = "0123456789ABCDEFGHJKLMNPRSTUVWXYZ"  # I, O and Q are not used: ISO 3779

WORDS = frozenset({"PERSON", "LOCATION", "ADDRESS", "DATE", "AGE", "MARKING"})
"""Classes whose values are words: case, punctuation and spacing do not count."""
AS_WRITTEN = frozenset({"EMAIL", "URL", "IP", "API_KEY", "PRIVATE_KEY"})
"""Classes whose punctuation counts. Of all others, numbers mostly, only letters and digits do."""


def pseudonym(entity: str, value: str, key: bytes) -> str:
    """The substitute for a value of a class. `key` is the derived key of the pseudonyms."""
    normalised = normalise(entity, value)
    digest = hmac.digest(key, f"{entity}\0{normalised}".encode("utf-8", "surrogatepass"), "sha256")
    number = int.from_bytes(digest, "big")
    match entity:
        case "PERSON":
            return _surname(number) if " " not in normalised else f"{GIVEN[number >> 24 & 127]} {_surname(number)}"
        case "LOCATION":
            return f"Port {_surname(number)}"
        case "ADDRESS":
            return f"{1 + (number >> 24) % 999} {_surname(number)} Street"
        case "PHONE" | "FAX":
            return _telephone(number)
        case "EMAIL":
            return f"user-{tag(digest)}@example.org"  # RFC 2606
        case "URL":
            return f"https://example.org/{tag(digest)}"
        case "IP":
            return _ip_v6(digest) if ":" in normalised else _ip_v4(number)
        case "SSN":  # no area of 900 and over; as a taxpayer's number (ITIN) no group under 50
            return f"9{number % 100:02d}-{number // 100 % 50:02d}-{number // 5000 % 10_000:04d}"
        case "CARD":
            return _card(number)
        case "IBAN":  # ZZ is no country's (ISO 3166, user-assigned), and 00 no check digits (ISO 13616: 02 to 98)
            letters = tag(digest).upper()
            return f"ZZ00 {letters[:4]} {letters[4:8]} {letters[8:]}"
        case "VIN":  # no manufacturer's code starts with 0 (ISO 3780)
            return "0ZZ" + "".join(VIN_LETTERS[byte % len(VIN_LETTERS)] for byte in digest[:14])
        case _:
            return f"{entity}-{tag(digest)}"


def substitutes(text: str) -> Iterator[tuple[int, int]]:
    """Where substitutes stand in a text, in no order."""
    for sign, shape in _SHAPES:
        if sign in text:
            yield from (match.span() for match in shape.finditer(text))
    if "-" in text:
        if _HYPHENATED.search(text):
            yield from _names(text)
        yield from (match.span() for match in _CODE.finditer(text) if match[1] in ENTITIES)


def _names(text: str) -> Iterator[tuple[int, int]]:
    for match in _NAMED.finditer(text):
        if _SURNAME.fullmatch(match[2]):
            whole = match[1] is None or match[1] in _BEFORE_SURNAME or match[1].isdigit()
            yield match.start() if whole else match.start(2), match.end()


def normalise(entity: str, value: str) -> str:
    """What is hashed of a value: equal for the ways in which one name or number is written."""
    text = " ".join((value.casefold() if value.isascii() else _casefolded(value)).split())
    if entity in AS_WRITTEN:
        return text
    if entity in ("PHONE", "FAX"):
        return _telephone_digits(text)
    if entity == "PERSON" and text.count(",") == 1:  # "Smith, John"
        last, _, first = text.partition(",")
        text = f"{first} {last}"
    if entity in WORDS:
        return " ".join("".join(c if _in_a_word(c) else " " for c in text).split()) or text
    return "".join(filter(str.isalnum, text)) or text


def _casefolded(text: str) -> str:
    """Equal for texts that differ in case or in how their characters are encoded: Unicode 16, definition D146."""
    for form in ("NFD", "NFKD"):
        text = unicodedata.normalize(form, text).casefold()
    return unicodedata.normalize("NFKC", text)


def _in_a_word(character: str) -> bool:
    """Letters, digits, the accents and vowel signs that stand on them, hyphen and apostrophes."""
    return character.isalnum() or character in "-'\u2019" or unicodedata.category(character).startswith("M")


def _telephone_digits(text: str) -> str:
    """The digits, without what stands for the country in front: +1, 1, 00, +."""
    digits = "".join(filter(str.isdigit, text)).removeprefix("00")
    return digits[1:] if len(digits) == 11 and digits.startswith("1") else digits or text


def _surname(number: int) -> str:
    """Of 2**24: two invented names with a hyphen."""
    a, b, c, d = (number >> shift & 63 for shift in (0, 6, 12, 18))
    return f"{FRONTS[a]}{BACKS[b]}-{FRONTS[c]}{BACKS[d]}"


def _telephone(number: int) -> str:
    """555-0100 to 555-0199 are kept for fiction in every area; the extension makes them many."""
    number, line = divmod(number, 100)
    number, area = divmod(number, 800)
    return f"+1-{200 + area}-555-01{line:02d} x{number % 100_000:05d}"


def _ip_v4(number: int) -> str:
    """Of 240.0.0.0 to 250.255.255.255, reserved by RFC 1112 and never routed."""
    number, first = divmod(number, 11)
    return f"{240 + first}.{number & 255}.{number >> 8 & 255}.{number >> 16 & 255}"


def _ip_v6(digest: bytes) -> str:
    """Of 2001:db8::/32, which RFC 3849 keeps for documentation."""
    return "2001:db8:" + ":".join(digest[i : i + 2].hex() for i in range(0, 12, 2))


def _card(number: int) -> str:
    """A number whose issuer, 0000, is nobody's, and whose check digit is wrong by one."""
    digits = f"0000{number % 10**11:011d}"
    doubled = (
        int(d) * (2 - i % 2) for i, d in enumerate(digits)
    )  # from the right every second, the check digit's left first
    check = (1 - sum(d - 9 * (d > 9) for d in doubled)) % 10
    text = f"{digits}{check}"
    return " ".join(text[i : i + 4] for i in range(0, 16, 4))
