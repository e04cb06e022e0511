"""Accounts, bank codes and payment cards."""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.data.redact import recognizers_checks as checks
from whet.data.redact.recognizers import Document, Labelled, Shape, Span

ISO_3166 = (
    "ad ae af ag ai al am ao ar as at au aw az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cd cf cg "
    "ch ci ck cl cm cn co cr cu cv cw cy cz de dj dk dm do dz ec ee eg er es et fi fj fk fm fo fr ga gb gd ge gf "
    "gg gh gi gl gm gn gp gq gr gt gu gw gy hk hn hr ht hu id ie il im in iq ir is it je jm jo jp ke kg kh ki km "
    "kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw "
    "mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pr ps pt pw py qa re ro rs ru rw sa "
    "sb sc sd se sg sh si sk sl sm sn so sr ss st sv sx sy sz tc td tg th tj tl tm tn to tr tt tv tw tz ua ug us "
    "uy uz va vc ve vg vi vn vu wf ws xk ye yt za zm zw "
)
ISO_COUNTRIES = frozenset(ISO_3166.split())


def _bic(value: str) -> bool:
    return value[4:6].lower() in ISO_COUNTRIES


COUNTRY = "|".join(sorted(code.lower() for code in checks.IBAN_LENGTHS))


START = re.compile(r"[a-z](?<![0-9a-z][a-z])(?=[a-z][0-9]{2}[ \-.]?[a-z0-9])")


SEPARATORS = re.compile(r"[ \-.]")


class Ibans:
    """Written in blocks or in one; the country says how many characters belong to it."""

    entity = "IBAN"

    def find(self, document: Document) -> Iterator[Span]:
        if not document.has_digit:
            return
        for match in START.finditer(document.folded):
            end = _end_of(
                document.folded,
                match.start(),
                checks.IBAN_LENGTHS.get(document.folded[match.start() : match.start() + 2].upper()),
            )
            if end is not None and _is_iban(document.folded[match.start() : end]):
                yield Span(match.start(), end, self.entity, 0.98)


def _is_iban(value: str) -> bool:
    """The check digits hold, and separators stand after every fourth character or nowhere."""
    blocks = SEPARATORS.split(value)
    return all(len(block) == 4 for block in blocks[:-1]) and checks.iban(value)


def _end_of(text: str, start: int, length: int | None) -> int | None:
    """Where `length` letters and digits from `start` end, single separators between them; None if they are fewer."""
    if length is None:
        return None
    position = start
    for place in range(length):
        if place and text[position : position + 1] in (" ", "-", "."):
            position += 1
        if not (text[position : position + 1].isascii() and text[position : position + 1].isalnum()):
            return None
        position += 1
    return None if text[position : position + 1].isalnum() else position


RECOGNIZERS = (
    Ibans(),
    Shape("CARD", re.compile(r"[0-9](?<![0-9a-z.\-][0-9])[0-9]{3}(?:[ \-.][0-9]{4}[ \-.][0-9]{4}[ \-.][0-9]{1,7}|"
        r"[ \-][0-9]{6}[ \-][0-9]{4,5}|[0-9]{8,15})(?![0-9a-z]|[\-.][0-9])"), 0.9, check=checks.card),
)  # fmt: skip

DIGITS = r"[0-9](?:[ \-]?[0-9]){5,19}"
BY_WORD = (
    Labelled("ACCOUNT", (
        "account", "account number", "acct", "acct number", "a/c", "a/c number", "bank account", "checking account",
        "savings account", "konto",
        "kontonummer", "kto", "kto-nr", "konto-nr", "kontonr", "compte", "numéro de compte", "n° de compte",
        "compte bancaire",
        "cuenta", "número de cuenta", "n.º de cuenta", "cuenta bancaria", "cuenta corriente", "customer number",
        "customer id",
        "customer no", "customer account", "client number", "client id", "kundennummer", "kunden-nr", "kundennr",
        "réf client", "référence client", "numéro client", "numéro de client",
        "n° client", "número de cliente", "n.º de cliente", "nº de cliente", "num cliente", "loan number",
        "loan account",
        "guarantor account", "billing account", "ccc", "membership number", "mitgliedsnummer", "mitglieds-nr",
        "vertragskonto", "vertragsnummer",
    ), rf"(?:[a-z]{{1,4}}-?)?{DIGITS}", 0.8),
    Labelled("ROUTING", ("routing", "routing number", "aba", "aba number", "rtn", "routing transit", "bank routing",
        "transit number"), r"[0-9]{4}[ \-]?[0-9]{4}[ \-]?[0-9]", 0.85, check=checks.aba),
    Labelled("ROUTING", ("sort code", "sort-code", "s/c", "sc"), r"[0-9]{2}[\- ]?[0-9]{2}[\- ]?[0-9]{2}", 0.87),
    Labelled("ROUTING", ("blz", "bankleitzahl"), r"[0-9]{3} ?[0-9]{3} ?[0-9]{2}", 0.9),
    Labelled("IBAN", ("iban",), rf"(?:{COUNTRY})[0-9]{{2}}(?:[ \-]?[a-z0-9]{{1,4}}){{3,8}}?(?=[^a-z0-9 ]|\s[^0-9]|$)",
        0.85),
    Labelled("CARD", (
        "card number", "card no", "credit card", "debit card", "visa", "mastercard", "amex", "american express",
        "cc number", "card",
        "kreditkarte", "kreditkartennummer", "kartennummer", "carte", "carte bancaire", "numéro de carte",
        "carte bleue", "tarjeta",
        "tarjeta de crédito", "número de tarjeta",
    ), r"[0-9]{4}[ \-.]?[0-9]{4}[ \-.]?[0-9]{4}[ \-.]?[0-9]{3,7}|[0-9]{4}[ \-][0-9]{6}[ \-][0-9]{5}", 0.9,
        check=checks.card),
    Labelled("SWIFT", ("bic", "swift", "swift code", "bic/swift", "swift/bic", "bic code", "code bic", "código bic",
        "código swift", "bic-code", "swift-code"), r"[a-z]{6}[a-z0-9]{2}(?:[a-z0-9]{3})?", 0.9, check=_bic,
        strict=True, digits=False),
)  # fmt: skip
