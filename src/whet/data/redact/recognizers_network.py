"""E-mail, web, IP and hardware addresses."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

from whet.data.redact.recognizers import Document, Labelled, Shape, Span

LOCAL = re.compile(r"[\w.+%'!#$&*/=?^`{|}~\-]{1,64}$")
DOMAIN = re.compile(r"(?:[^\W_](?:[\w\-]{0,62})\.){1,8}[^\W\d_]{2,24}(?![^\W_])|\[\d{1,3}(?:\.\d{1,3}){3}\]")
OPENING = "'`*/={|&#$?!.\"_~^%"


class Emails:
    """From each @ to both sides, so that a text without one costs nothing and no start is tried twice."""

    entity = "EMAIL"

    def find(self, document: Document) -> Iterator[Span]:
        text = document.text
        position = text.find("@")
        while position >= 0:
            if (span := self._around(text, position)) is not None:
                yield span
            position = text.find("@", position + 1)

    def _around(self, text: str, at: int) -> Span | None:
        before = text[max(0, at - 64) : at]
        local = LOCAL.search(before)
        domain = DOMAIN.match(text, at + 1)
        if local is None or domain is None:
            return None
        name = local.group().rsplit("=", 1)[-1].rsplit("/", 1)[-1].lstrip(OPENING)
        return Span(at - len(name), domain.end(), self.entity, 0.99) if name else None


SCHEME = re.compile(
    r"(?<![a-z0-9])(?:https?|ftps?|sftp|ssh|s3|gs|git|wss?|jdbc:[a-z]{2,12}|postgres(?:ql)?|mysql|mongodb(?:\+srv)?|"
    r"rediss?|amqps?|ldaps?|smb|file|tel|sip)://[^\s<>\"'`|\\^{}]{2,2048}"
)
HOST = re.compile(
    r"(?<![a-z0-9@.\-_/])(?:www\.[a-z0-9\-]{1,63}(?:\.[a-z0-9\-]{1,63}){1,4}|"
    r"(?:[a-z0-9][a-z0-9\-]{0,62}\.){1,4}(?:com|org|net|edu|gov|mil|info|co\.uk|org\.uk|ac\.uk|nhs\.uk)(?![a-z0-9\-]|"
    r"\.[a-z0-9])|(?:[a-z0-9][a-z0-9\-]{0,62}\.){1,4}(?:de|fr|es|uk|io|eu|ai|dev|app|ch|at|be|it|nl|us|"
    r"ca)(?=/[a-z0-9]))"
    r"(?::\d{2,5})?(?:[/?#][^\s<>\"'`|\\^{}]{0,2048})?"
)


class Urls:
    """With a scheme, with www, or a host of a usual domain; the punctuation of the sentence around it left out."""

    entity = "URL"

    def find(self, document: Document) -> Iterator[Span]:
        text = document.folded
        if "://" in text:
            yield from self._matches(SCHEME, text, 0.995)
        if "." in text:
            yield from self._matches(HOST, text, 0.9)

    def _matches(self, pattern: re.Pattern[str], text: str, score: float) -> Iterator[Span]:
        for match in pattern.finditer(text):
            yield Span(match.start(), match.start() + _length(match.group()), self.entity, score)


def _length(url: str) -> int:
    """Without the sentence's punctuation at the end; a bracket stays if it was opened inside."""
    end = len(url)
    while end and (
        url[end - 1] in ".,;:!?*_]" or (url[end - 1] == ")" and url.count(")", 0, end) > url.count("(", 0, end))
    ):
        end -= 1
    return end


SHORTEST_IPV6 = 4  # digits: "::1" names no machine, and "a[1::2]" is code


def _ipv6(value: str) -> bool:
    try:
        ipaddress.IPv6Address(value.partition("%")[0].partition("/")[0])
    except ValueError:
        return False
    return any(map(str.isdigit, value)) and len(value) - value.count(":") >= SHORTEST_IPV6


def _ipv4(value: str) -> bool:
    first = value.partition(".")[0]
    return int(first) <= 255 and (first == "0" or first[0] != "0")


OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
VERSION = re.compile(
    r"(?:(?<![a-z])(?:v|ver|version(?:en|s)?|release|build|firmware|fw|rev|revision|kernel|driver|section|sec|chapter|"
    r"abschnitt|kapitel|capitulo|seccion|chapitre|oid|update|patch|sdk|ios|software|browser|chrome|firefox|edge|"
    r"safari|agent|revision|fassung|paket|package)(?: (?:is|ist|est|es|number|nummer|numero|no))?[\s.:=#\-]{0,2}|"
    r"[a-z0-9]\.|/|(?:to|auf|a|from|von|de) version )$"
)

RECOGNIZERS = (
    Emails(),
    Urls(),
    Shape("IP", re.compile(rf"[0-9](?<![0-9a-z.\-][0-9])[0-9]{{0,2}}\.(?:{OCTET}\.){{2}}{OCTET}"
        rf"(?:/[0-9]{{1,2}})?(?![0-9a-z]|\.[0-9]|-[0-9])"), 0.85, check=_ipv4, unless=VERSION, hints=(".",)),
    Shape("IP", re.compile(r"(?:(?<![0-9a-z:.])|(?<=[g-z]:)|"
        r"(?<=[a-z]{5}:))((?=[0-9a-f]{0,4}:[0-9a-f:]{0,4}:)[0-9a-f:]{2,39}"
        r"(?:[0-9.]{7,15})?(?:%[a-z0-9]{1,12})?(?:/[0-9]{1,3})?)(?![0-9a-z:])"), 0.9, check=_ipv6,
        needs=re.compile(":[0-9a-f]{0,4}:")),
    Shape("MAC", re.compile(r"(?<![0-9a-z])(?<![^a-z0-9][0-9a-f]{2}:)(?:[0-9a-f]{2}:){5}[0-9a-f]{2}(?![0-9a-z:\-])|"
        r"(?<![0-9a-z\-])(?:[0-9a-f]{2}-){5}[0-9a-f]{2}(?![0-9a-z\-])"), 0.95,
        needs=re.compile(":[0-9a-f]{2}:[0-9a-f]{2}:|-[0-9a-f]{2}-[0-9a-f]{2}-[0-9a-f]{2}-")),
    Shape("MAC", re.compile(r"(?<![0-9a-z.])[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}(?![0-9a-z.])"), 0.9,
    needs=re.compile(r"\.[0-9a-f]{4}\.")),
)  # fmt: skip
BY_WORD: tuple[Labelled, ...] = ()
