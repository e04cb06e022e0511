"""Dates finer than a year, and ages of 90 and over, in English, German, French and Spanish.

A time is part of the date that it stands beside. A year alone, a month alone and a weekday alone are left.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from whet.data.redact.recognizers import Anchored, Document, Labelled, Span, fold

MONTHS = (
    ("january", "jan", "januar", "jänner", "janvier", "janv", "enero", "ene"),
    ("february", "feb", "februar", "feber", "février", "févr", "fév", "febrero"),
    ("march", "mar", "märz", "mär", "mrz", "maerz", "mars", "marzo"),
    ("april", "apr", "avril", "avr", "abril", "abr"),
    ("may", "mai", "mayo"),
    ("june", "jun", "juni", "juin", "junio"),
    ("july", "jul", "juli", "juillet", "juil", "julio"),
    ("august", "aug", "août", "aoû", "agosto", "ago"),
    ("september", "sep", "sept", "septembre", "septiembre", "setiembre"),
    ("october", "oct", "oktober", "okt", "octobre", "octubre"),
    ("november", "nov", "novembre", "noviembre"),
    ("december", "dec", "dezember", "dez", "décembre", "déc", "diciembre", "dic"),
)
WEEKDAYS = (
    "monday|tuesday|wednesday|thursday|friday|saturday|sunday|mon|tues?|wed|thurs?|thu|fri|sat|sun|"
    "montag|dienstag|mittwoch|donnerstag|freitag|samstag|sonnabend|sonntag|lundi|mardi|mercredi|jeudi|vendredi|samedi|"
    "dimanche|lunes|martes|miercoles|jueves|viernes|sabado|domingo|"
    "mo|di|mi|do|fr|sa|so|lun|mer|jeu|ven|sam|dim|mie|jue|vie|sab|dom"
)
MONTH = "(?:" + "|".join(sorted({fold(name) for names in MONTHS for name in names}, key=lambda n: (-len(n), n))) + ")"
MONTH_WORDS = frozenset(fold(name) for names in MONTHS for name in names)
MONTH_HINTS = tuple(sorted({fold(name)[:3] for names in MONTHS for name in names}))

YEAR = r"(?:1[89]|20)[0-9]{2}"
DAY = r"(?:3[01]|[12][0-9]|0?[1-9])"
ZONE = r"(?:\s?(?:z|utc|gmt|cest|cet|e[sd]t|c[sd]t|m[sd]t|p[sd]t|bst)(?![a-z])|\s?[+\-][0-9]{2}:?[0-9]{2})?"
CLOCK = (
    r"(?:[01]?[0-9]|2[0-4])(?::[0-5][0-9](?::[0-6][0-9](?:[.,][0-9]{1,9})?)?(?:\s?[ap]\.?m\.?(?![a-z]))?"
    r"(?:\s?(?:uhr|hrs?|h)(?![a-z]))?|\s?[ap]\.?m\.?(?![a-z])|\s?h\s?(?:[0-5][0-9])?(?![a-z0-9])|\s?uhr(?![a-z])|"
    r"\.[0-5][0-9]\s?uhr)"
) + ZONE
TIME = rf"(?:(?:,?\s{{0,2}}(?:at|um|a las|a la|a|@|-)?\s{{0,2}}|t|:|_){CLOCK})?(?![0-9])"
WEEKDAY = re.compile(rf"(?<![a-z])(?:(?:{WEEKDAYS})\.?,?\s{{1,2}}(?:the |den |dem |le |el |dia )?|the )$")

ISO = re.compile(
    rf"[12](?<![0-9a-z.\-/][12])(?:[089][0-9]{{2}})(?P<joint>[\-/.])(?:0[1-9]|1[0-2])(?P=joint)(?:0[1-9]|[12][0-9]|"
    rf"3[01])(?![0-9])(?![\-/.][0-9])(?:{TIME})"
)
COMPACT = re.compile(
    r"[12](?<![0-9a-z][12])(?:[089][0-9]{2})(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|"
    r"3[01])t[0-9]{4,6}(?:\.[0-9]{1,6})?z?(?![0-9a-z])"
)
NUMERIC = re.compile(
    rf"(?P<first>[0-9](?<![0-9a-z.\-/][0-9])[0-9]?)(?P<joint>\s?[./\-]\s?)(?P<second>[0-9]{{1,2}})(?P=joint)"
    rf"(?P<year>{YEAR}|[0-9]{{2}})(?![0-9a-su-z])(?![./\-][0-9])(?:{TIME})"
)
DAY_MONTH = re.compile(
    rf"(?P<day>[0-9](?<![0-9a-z.][0-9])(?<![0-9][/\-,][0-9])[0-9]?)(?:st|nd|rd|th|er|[.ºª°])?(?:\s{{0,2}}[\-/]\s?|"
    rf"\s{{1,2}}|(?<=\.))(?:of |de |del |day of )?(?P<month>{MONTH})(?![a-z])\.?(?:(?:,?\s{{1,2}}|\s?[\-/]\s?|,)(?:de "
    rf"|del |in |of )?(?P<year>{YEAR}|'[0-9]{{2}}|"
    rf"(?<=[\-/])[0-9]{{2}}(?![0-9:])))?(?![0-9])(?:{TIME})"
)
MONTH_DAY = re.compile(
    rf"(?<![a-z])(?P<month>{MONTH})(?![a-z])\.?(?:\s{{1,2}}|-)(?:the )?(?P<day>{DAY})(?:st|nd|rd|th)?(?![0-9])"
    rf"(?![.,:][0-9]|%|\s?(?:percent|prozent|people|users|items|years|euro|eur|usd|mg|ml|kg|km)(?![a-z]))"
    rf"(?:(?:,?\s{{1,2}}|-|,)(?P<year>{YEAR}|'[0-9]{{2}})(?![0-9]))?(?:{TIME})(?:\s(?P<late>{YEAR})(?![0-9]))?"
)
MONTH_YEAR = re.compile(
    rf"(?<![a-z])(?P<month>{MONTH})(?![a-z])\.?,?(?:\s{{1,2}}|[\-/])(?:de |del |of )?(?P<year>{YEAR})(?![0-9\-])"
)
SLASHED_MONTH = re.compile(
    rf"[01](?<![0-9a-z./\-][01])(?:(?<=0)[1-9]|(?<=1)[0-2])[/.](?:{YEAR})(?![0-9a-z/\-]|"
    rf"\.[0-9])"
)
ISO_MONTH = re.compile(r"[12](?<![0-9a-z./\-][12])(?:9|0)[0-9]{2}-(?:0[1-9]|1[0-2])(?![0-9a-z/\-:]|\.[0-9])")
SHORT_GERMAN = re.compile(
    rf"(?:am|vom|zum|bis|ab|seit|den|dem)\s(?:(?:{WEEKDAYS}),?\s)?({DAY}\.\s?(?:0?[1-9]|1[0-2])\.)(?!\s?[0-9])"
)
SHORT_ENGLISH = re.compile(r"[a-z]{2,10}\s(?:on\s)?((?:0[1-9]|1[0-2]|[1-9])/(?:0[1-9]|[12][0-9]|3[01]))(?![0-9/])")
SHORT_ROMANCE = re.compile(r"(?:le|du|au|el|dia)\s((?:0[1-9]|[12][0-9]|3[01])/(?:0[1-9]|1[0-2]))(?![0-9/])")
VERSION = re.compile(
    r"(?<![a-z])(?:v|ver|versions?|release|build|section|sec|chapter|kapitel|abschnitt|python|node|java|firmware|"
    r"paragraph|seccion|capitulo|chapitre|article|artikel|ziffer|kernel|update|patch|sdk|rev|revision|fassung|ausgabe|"
    r"auflage|"
    r"edition|ratio|score)[\s.:]{0,2}$"
)
OTHER = re.compile(
    r"(?<![a-z])(?:invoice|inv|order|ref|reference|part|ticket|rechnung|factura|facture|"
    r"rechnungsnummer|no|nr|num|n°)[\s.:#]{0,3}$"
)
SURE_LOWER = frozenset(
    map(fold, ("may", "mar", "march", "mars", "jun", "sat", "dec", "sep", "ene", "ago", "avr", "abr", "dic", "jan"))
)


class Dates:
    """All the forms above; a day and a month must exist."""

    entity = "DATE"

    def find(self, document: Document) -> Iterator[Span]:
        if not document.has_digit:
            return
        text = document.folded
        for match in ISO.finditer(text):
            yield self._span(match, 0.95)
        for match in NUMERIC.finditer(text):
            if self._numeric(match, document):
                yield self._span(match, 0.92 if len(match["year"]) == 4 else 0.7)
        yield from self._months_in_digits(document)
        if any(hint in text for hint in MONTH_HINTS):
            yield from self._named_months(document)

    def _span(self, match: re.Match[str], score: float, group: int = 0) -> Span:
        """The match, with the weekday before it."""
        start, end = match.span(group)
        before = match.string[max(0, start - 20) : start]
        weekday = WEEKDAY.search(before)
        return Span(start - len(weekday.group()) if weekday else start, end, self.entity, score)

    def _numeric(self, match: re.Match[str], document: Document) -> bool:
        first, second = int(match["first"]), int(match["second"])
        if not (1 <= min(first, second) <= 12 and 1 <= max(first, second) <= 31):
            return False
        before = document.before(match.start("first"), 16)
        return len(match["year"]) == 4 or not (VERSION.search(before) or OTHER.search(before))

    def _months_in_digits(self, document: Document) -> Iterator[Span]:
        text = document.folded
        for match in COMPACT.finditer(text):
            yield self._span(match, 0.9)
        for pattern in (SLASHED_MONTH, ISO_MONTH):
            for match in pattern.finditer(text):
                if not OTHER.search(document.before(match.start(), 16)):
                    yield self._span(match, 0.6)

    def _named_months(self, document: Document) -> Iterator[Span]:
        for match in DAY_MONTH.finditer(document.folded):
            if match["year"] or self._is_month(match, document):
                yield self._span(match, 0.93 if match["year"] else 0.8)
        for word, position in document.words:
            if word not in MONTH_WORDS:
                continue
            day = MONTH_DAY.match(document.folded, position)
            if day is not None and (day["year"] or self._is_month(day, document)):
                yield self._span(day, 0.93 if day["year"] else 0.8)
            year = MONTH_YEAR.match(document.folded, position)
            if year is not None:
                yield self._span(year, 0.85)

    def _is_month(self, match: re.Match[str], document: Document) -> bool:
        """Words that are also others ("may 10", "mar 3", "10 dec") count with a capital only, when no year follows."""
        month = match["month"]
        return (
            month not in SURE_LOWER
            or document.text[match.start("month")].isupper()
            or (match.re is DAY_MONTH and month == "mars")
        )


OLD = re.compile(r"(?:9[0-9]|1[0-2][0-9])(?![0-9])")
OLD_AFTER = re.compile(
    r"[\s\-]?(?:years?|yrs?|yr)[\s\-](?:old|of age)|[\s\-]?y/?\.?o\.?(?![a-z])|[\s\-]?jahrige?[rnsm]?(?![a-z])|"
    r"\s?jahren? (?:alt|alte[rnsm]?)(?![a-z])|-?year-?old|\s?anos de edad|\s?(?:[mf]|male|"
    r"female)(?![a-z0-9])\s(?:with|who|presents|presenting|admitted|seen|c/o|s/p)"
)
OLD_BEFORE = re.compile(
    r"(?<![a-z])(?:age|aged|ages|alter|lebensalter|edad|age of|at the age of|im alter von|turned|turning|turns|"
    r"agee?s? d(?:e |'environ )|a l'age de|cumplio|cumple|cumplir)(?:\s?\((?:years?|jahre|ans|anos)\))?(?:\s?[:=]|"
    r"\sis|\sof|\sist|\sest)?[\s\"']{0,3}$"
)
NO_AGE = re.compile(
    r"[.,][0-9]|\s?(?:%|percent|prozent|days?|months?|hours?|minutes?|weeks?|tage|monate|jours|mois|"
    r"dias|meses)(?![a-z])"
)
YEARS_AFTER = re.compile(
    r"\s(?:ans|anos|jahren?)(?![a-z])(?!\s(?:d'experience|de garantie|de experiencia|garantie|erfahrung|de service|de "
    r"servicio|de garantia|de maison|de duree|d'anciennete|de antiguedad))"
)
PERSON_BEFORE = re.compile(
    r"(?<![a-z])(?:mit|de|tiene|a|hat|sus|ses|is|ist|est|wird|wurde|she's|he's|aujourd'hui|von)\s$"
)
ASIDE = re.compile(r"\s(?:ans|anos|jahren?|years|yrs)[),]")
IN_WORDS = re.compile(
    r"((?:ninety|one hundred|a hundred)(?:[\s\-](?:and[\s\-])?(?:one|two|three|four|five|six|seven|"
    r"eight|nine))?)[\s\-]years?[\s\-](?:old|of age)(?![a-z])"
)


class Ages:
    """The number of an age from 90 on; what stands before or after it says that it is one."""

    entity = "AGE"

    def find(self, document: Document) -> Iterator[Span]:
        for match in OLD.finditer(document.folded):
            if self._is_age(document, *match.span()):
                yield Span(*match.span(), self.entity, 0.9)

    def _is_age(self, document: Document, start: int, end: int) -> bool:
        text = document.folded
        if text[start - 1 : start].isalnum() or text[start - 1 : start] in ("-", "/") or NO_AGE.match(text, end):
            return False
        if text[start - 1 : start] in (".", ",") and text[start - 2 : start - 1].isdecimal():
            return False
        if OLD_AFTER.match(text, end) or (text[start - 1 : start] in ("(", ",") and ASIDE.match(text, end)):
            return True
        before = document.before(start, 28)
        if OLD_BEFORE.search(before):
            return True
        return YEARS_AFTER.match(text, end) is not None and (
            PERSON_BEFORE.search(before) is not None or before.endswith(", ")
        )


RECOGNIZERS = (Dates(), Ages())
BY_WORD = (
    Anchored("AGE", ("ninety", "one", "a"), IN_WORDS, 0.9, cased=False),
    Anchored("DATE", ("am", "vom", "zum", "bis", "ab", "seit", "den", "dem"), SHORT_GERMAN, 0.7, cased=False),
    Anchored("DATE", ("dob", "admitted", "discharged", "seen", "due", "dated", "since", "until", "on", "by"),
        SHORT_ENGLISH, 0.7, cased=False),
    Anchored("DATE", ("le", "du", "au", "el", "dia"), SHORT_ROMANCE, 0.7, cased=False),
    Labelled(
        "DATE",
        (
            "dob", "date of birth", "birth date", "birthdate", "birthday", "geburtsdatum", "geb", "geboren",
            "date de naissance",
            "né le", "née le", "fecha de nacimiento", "admission date", "discharge date", "dod", "date of death",
            "date of service", "service date", "dos", "datum", "fecha",
        ),
        rf"(?:{YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])|(?:0[1-9]|[12][0-9]|3[01]) (?:0[1-9]|1[0-2]) {YEAR}|"
        rf"(?:0[1-9]|1[0-2]) (?:0[1-9]|[12][0-9]|3[01]) {YEAR})",
        0.9, gap=r"(?P<gap>[^0-9a-z]{0,6})",
    ),
)  # fmt: skip
