"""What takes the place of a value that was found, mode by mode, and how replacements are known again.

    placeholder   [EMAIL]
    pseudonym     a substitute of the same kind, by keyed hash (pseudonyms.py)
    mask          ****1234: the last digits where a class is safe to show them, else none
    generalise    a date's year, a ZIP's first three digits, "90 or older", a network's address; else the placeholder
    drop, keep    no replacements: `drop` leaves the row out, classes under `keep` are not looked for

A value that its mode leaves as it is (an age under 90) is given back unchanged.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from whet.data.redact.entities import ENTITIES
from whet.data.redact.keys import MAKE, derive
from whet.data.redact.marks import TAG, marked, placeholder, tag
from whet.data.redact.pseudonyms import pseudonym, substitutes
from whet.errors import WhetError

Mode = Literal["placeholder", "pseudonym", "mask", "generalise", "drop", "keep"]

CACHED = 1 << 16  # values whose replacements are remembered, in memory only
SHOWN = {"CARD": 4, "IBAN": 4, "ACCOUNT": 2, "PHONE": 2, "FAX": 2}
"""Digits that `mask` leaves at the end, where the value has at least four times as many letters and digits."""

_RESTRICTED_ZIPS = "036 059 063 102 203 556 692 790 821 823 830 831 878 879 884 890 893"
RESTRICTED_ZIPS = frozenset(_RESTRICTED_ZIPS.split())
"""First three digits that 20,000 people or fewer share, by the Census of 2000: HHS, Guidance Regarding Methods for
De-identification of Protected Health Information (2012), on 45 CFR 164.514(b)(2)(i)(B)."""
YEARS_FROM = 1950
"""Earlier years may tell an age over 89, which 45 CFR 164.514(b)(2)(i)(C) wants gone, year included. A fixed year, for
the same result on any day; it holds until 2039."""

YEAR = re.compile(r"(?<![0-9])(?:1[0-9]|20|21)[0-9]{2}(?![0-9])")
OLDEST = "90 or older"
_PLACEHOLDER = re.compile(rf"\[(?:{'|'.join(ENTITIES)})(?:_{TAG})?\]")
_COARSER = tuple(
    (sign, re.compile(pattern))
    for sign, pattern in (
        ("****", r"\*{4}(?:[0-9]{4}|[0-9]{2})?(?![0-9A-Za-z]|[^\s\w][0-9A-Za-z])"),
        (OLDEST, OLDEST),
    )
)
_MARKED = re.compile(rf" \[#{TAG}\]")


class Replacer:
    """The replacement for a value of a class, always the same. With `marks`, one by which a vault restores it."""

    def __init__(self, modes: Mapping[str, Mode], *, key: bytes | None = None, marks: bool = False) -> None:
        hashed = sorted(entity for entity, mode in modes.items() if mode == "pseudonym")
        if key is None and (hashed or marks):
            why = "a vault" if marks else f"pseudonyms (here {', '.join(hashed)})"
            fix = f"{MAKE} and name that file, or use placeholders without a vault"
            raise WhetError(f"{why} can't be had without a key", where="redact.key", fix=fix)
        self._modes = dict(modes)
        self._pseudonym_key = derive(key, "whet pseudonyms 1") if key else b""
        self._mark_key = derive(key, "whet marks 1") if key and marks else b""
        self.replacement = lru_cache(maxsize=CACHED)(self._replacement)

    def _replacement(self, entity: str, value: str) -> str:
        mode = self._modes[entity]
        if mode == "pseudonym":
            new = pseudonym(entity, value, self._pseudonym_key)
        elif mode == "mask":
            new = mask(entity, value)
        elif mode == "generalise":
            new = generalise(entity, value)
        else:
            return self.placeholder(entity, value)
        if new == placeholder(entity, None):
            return self.placeholder(entity, value)
        return new if new == value else marked(new, self._mark(entity, value))

    def placeholder(self, entity: str, value: str) -> str:
        return placeholder(entity, self._mark(entity, value))

    def _mark(self, entity: str, value: str) -> str | None:
        if not self._mark_key:
            return None
        return tag(hmac.digest(self._mark_key, f"{entity}\0{value}".encode("utf-8", "surrogatepass"), "sha256"))


def replaced(text: str) -> list[tuple[int, int]]:
    """Where replacements stand in a text, sorted and apart; they are never redacted again."""
    found = list(substitutes(text))
    for sign, shape in _COARSER:
        if sign in text:
            found += (match.span() for match in shape.finditer(text))
    if "[" in text:
        found += (match.span() for match in _PLACEHOLDER.finditer(text))
    if " [#" in text:  # what a mark follows may look like anything: a year, three digits and two zeros
        for match in _MARKED.finditer(text):
            start = max(text.rfind(space, 0, match.start()) for space in " \n\t") + 1
            found.append((start, match.end()))
    return _joined(sorted(found))


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    apart: list[tuple[int, int]] = []
    for start, end in spans:
        if apart and start < apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]))
        else:
            apart.append((start, end))
    return apart


def mask(entity: str, value: str) -> str:
    """Four stars and what may be shown. The stars are four for any value, so that its length stays untold."""
    kept = "".join(filter(str.isalnum, value))
    shown = SHOWN.get(entity, 0)
    last = kept[-shown:] if shown and len(kept) >= 4 * shown else ""
    return "****" + (last if last.isascii() and last.isdigit() else "")


def generalise(entity: str, value: str) -> str:
    """A coarser value that says less; the placeholder where there is none."""
    coarser = {"DATE": _year, "ZIP": _zip, "AGE": _age, "IP": _network}.get(entity)
    return (coarser(value) if coarser else None) or placeholder(entity, None)


def _year(value: str) -> str | None:
    """The year, if it is the only one and written with four digits: 3/4/21 may be of any century."""
    years = set(YEAR.findall(value))
    year = years.pop() if len(years) == 1 else None
    return year if year and int(year) >= YEARS_FROM else None


def _zip(value: str) -> str | None:
    digits = re.match(r"[0-9]{3}", value.strip())
    if digits is None:
        return None
    return "000" if digits[0] in RESTRICTED_ZIPS | {"000"} else f"{digits[0]}00"


def _age(value: str) -> str | None:
    number = re.search(r"[0-9]+", value)
    if number is None:
        return None
    return OLDEST if int(number[0]) >= 90 else value


def _network(value: str) -> str | None:
    """The address of the /24 that an IPv4 address is in, of the /48 of an IPv6 one; coarser networks keep theirs."""
    try:
        network = ipaddress.ip_interface(value.strip()).network
    except ValueError:
        return None
    most = 24 if network.version == 4 else 48
    return str((network if network.prefixlen <= most else network.supernet(new_prefix=most)).network_address)
