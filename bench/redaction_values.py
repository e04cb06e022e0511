"""Values for the labelled documents: people, places, dates and networks; Faker's where it has them.

Each function takes a `Maker` (random, Faker, locale) and returns a text, or a list of (text, class | None) parts.
Nothing here imports whet, so that a mistake in its checks shows.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import phonenumbers
from faker import Faker
from redaction_labels import DATES, MONTHS, SHORT_MONTHS, WEEKDAYS

Parts = list[tuple[str, str | None]]
SAFE = "ABCDEFGHJKLMNPRSTUVWXYZ"
HEX = "0123456789abcdef"
ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass
class Maker:
    rng: random.Random
    fake: Faker
    locale: str

    @property
    def language(self) -> str:
        return self.locale[:2]

    @property
    def country(self) -> str:
        return self.locale[3:]

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def shape(self, pattern: str) -> str:
        """# a digit, % a digit but 0, ? a capital letter, * a capital or digit; everything else as it is."""
        table: dict[str, Callable[[], str]] = {
            "#": lambda: self.rng.choice(string.digits),
            "%": lambda: self.rng.choice("123456789"),
            "?": lambda: self.rng.choice(SAFE),
            "*": lambda: self.rng.choice(SAFE + "23456789"),
        }
        return "".join(table[character]() if character in table else character for character in pattern)

    def characters(self, count: int, alphabet: str = ALPHANUMERIC) -> str:
        return "".join(self.rng.choice(alphabet) for _ in range(count))


# ------------------------------------------------------------------ people and places


def person(m: Maker) -> str:
    return f"{m.fake.first_name()} {m.fake.last_name()}"


def address(m: Maker) -> Parts:
    joint = m.pick(", ", "\n", ", ")
    street = m.fake.street_address().replace("\n", m.pick("\n", ", "))
    if m.country == "US":
        place: Parts = [
            (m.fake.city(), "LOCATION"),
            (", ", None),
            (m.fake.state_abbr(include_freely_associated_states=False) + " ", None),
        ]
        return [
            (street, "ADDRESS"),
            (joint, None),
            *place,
            (m.pick(m.fake.postcode(), m.fake.postcode() + "-" + m.shape("####")), "ZIP"),
        ]
    if m.country == "GB":
        return [
            (street, "ADDRESS"),
            (joint, None),
            (m.fake.city(), "LOCATION"),
            (m.pick(", ", " ", "\n"), None),
            (m.fake.postcode(), "ADDRESS"),
        ]
    return [(street, "ADDRESS"), (joint, None), (f"{m.fake.postcode()} {m.fake.city()}", "ADDRESS")]


def date(m: Maker) -> str:
    return _date(m, m.pick(*DATES[m.locale]))


def _date(m: Maker, form: str) -> str:
    day = m.fake.date_between("-90y", "today")
    names = {
        "d": day.day, "dd": f"{day.day:02d}", "m": day.month, "mm": f"{day.month:02d}", "Y": day.year,
        "yy": f"{day.year % 100:02d}",
        "M": MONTHS[m.language][day.month - 1], "b": SHORT_MONTHS[m.language][day.month - 1],
        "A": WEEKDAYS[m.language][day.weekday()], "T": f"{m.rng.randrange(7, 22):02d}:{m.rng.randrange(60):02d}",
        "th": "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th"),
    }  # fmt: skip
    return form.format(**names)


def clock_time(m: Maker) -> str:
    return f"{m.rng.randrange(7, 22)}{'h' if m.language == 'fr' else ':'}{m.rng.randrange(60):02d}"


def date_time(m: Maker) -> str:
    day = _date(
        m,
        m.pick(
            *(
                form
                for form in DATES[m.locale]
                if ("{T}" not in form and "{d}" in form) or ("{dd}" in form and "{T}" not in form)
            )
        ),
    )
    joint = {"en": " at ", "de": " um ", "fr": " à ", "es": " a las "}[m.language]
    return day + joint + clock_time(m) + (" Uhr" if m.language == "de" else "")


def log_time(m: Maker) -> str:
    clock = f"{m.rng.randrange(24):02d}:{m.rng.randrange(60):02d}:{m.rng.randrange(60):02d}"
    day = m.fake.date_between("-5y", "today")
    month = SHORT_MONTHS["en"][day.month - 1]
    return str(m.pick(f"{day.isoformat()} {clock},{m.shape('###')}", f"{day.isoformat()}T{clock}Z",
        f"{day.isoformat()}T{clock}.{m.shape('###')}+02:00", f"{month} {day.day:2d} {clock}",
            f"[{day.day:02d}/{month}/{day.year}:{clock} +0000]"))  # fmt: skip


def rfc_date(m: Maker) -> str:
    day = m.fake.date_between("-5y", "today")
    clock = f"{m.rng.randrange(24):02d}:{m.rng.randrange(60):02d}:05 {m.pick('+0000', '-0500', '+0100')}"
    return f"{WEEKDAYS['en'][day.weekday()][:3]}, {day.day} {SHORT_MONTHS['en'][day.month - 1]} {day.year} {clock}"


OLD = {
    "en": ("{a}-year-old", "{a} year old", "{a} y/o", "{a} yo", "patient aged {a}", "{a}-year-old woman"),
    "de": ("{a}-jährige Patient", "{a} Jahre alte Patient", "{a}-jährige Rentner", "Mann im Alter von {a} Jahren"),
    "fr": ("Patiente de {a} ans", "Âgée de {a} ans", "Homme de {a} ans", "Femme âgée de {a} ans"),
    "es": ("Paciente de {a} años", "Mujer de {a} años", "Varón de {a} años de edad", "Edad: {a} años"),
}
YOUNG = {"en": ("{a} years old", "{a}"), "de": ("{a} Jahren", "{a}"), "fr": ("{a} ans",), "es": ("{a} años",)}


def old(m: Maker) -> Parts:
    before, after = m.pick(*OLD[m.language]).split("{a}")
    return [(before, None), (old_number(m), "AGE"), (after, None)]


def old_number(m: Maker) -> str:
    return str(m.rng.randrange(90, 108))


# ------------------------------------------------------------------ telephone and network


def phone(m: Maker, labelled: bool = False) -> str:
    number = _valid_number(m)
    formats = phonenumbers.PhoneNumberFormat
    national = phonenumbers.format_number(number, formats.NATIONAL)
    forms = [
        national,
        national,
        phonenumbers.format_number(number, formats.INTERNATIONAL),
        phonenumbers.format_number(number, formats.E164),
    ]
    if m.country == "US":
        digits = str(number.national_number)
        a, b, c = digits[:3], digits[3:6], digits[6:]
        forms += [
            f"{a}-{b}-{c}",
            f"{a}.{b}.{c}",
            f"({a}){b}-{c}",
            f"1-{a}-{b}-{c}",
            f"+1 ({a}) {b}-{c}",
            f"{a}-{b}-{c} x{m.shape('%##')}",
            f"({a}) {b}-{c} ext. {m.shape('%##')}",
        ]
    else:
        forms.append("00" + phonenumbers.format_number(number, formats.INTERNATIONAL)[1:])
    if m.country == "DE":
        forms += [national.replace(" ", "/", 1), national.replace(" ", "-", 1), national.replace(" ", " / ", 1)]
    if m.country == "FR":
        forms += [national.replace(" ", "."), national.replace(" ", "-")]
    if labelled:
        forms.append(national.replace(" ", "").replace("(", "").replace(")", "").replace("-", ""))
    return str(m.rng.choice(forms))


PREFIXES = {
    "US": ("212", "415", "312", "617", "206", "303", "404", "512", "702", "919"), "GB": ("20", "121", "161", "131",
    "77", "78", "79", "1224", "1483"),
    "DE": ("30", "40", "89", "221", "711", "151", "160", "170", "176", "6221"), "FR": ("1", "2", "3", "4", "5", "6",
    "7"), "ES": ("91", "93", "95", "96", "6", "6", "7"),
}  # fmt: skip
LENGTHS = {"US": (10,), "GB": (10,), "DE": (10, 11), "FR": (9,), "ES": (9,)}


def _valid_number(m: Maker) -> Any:
    while True:
        body = m.pick(*PREFIXES[m.country])
        body += m.shape("%" + "#" * (m.pick(*LENGTHS[m.country]) - len(body) - 1))
        number = (
            phonenumbers.parse(body, m.country)
            if m.country in ("US", "ES")
            else phonenumbers.parse("0" + body, m.country)
        )
        if phonenumbers.is_valid_number(number):
            return number


def email(m: Maker) -> str:
    plain = m.pick(m.fake.email(), m.fake.company_email(), m.fake.ascii_free_email())
    name, _, domain = plain.partition("@")
    return str(
        m.pick(
            plain,
            plain,
            f"{name}+{m.fake.word().lower()}@{domain}",
            f"{name.replace('.', '_')}@mail.{domain}",
            plain.upper(),
            f"{name}{m.shape('##')}@{domain}",
        )
    )


def url(m: Maker) -> str:
    host = m.fake.domain_name()
    path = "/".join(m.fake.slug() for _ in range(m.rng.randrange(1, 3)))
    return str(
        m.pick(
            m.fake.url(),
            f"https://www.{host}/{path}",
            f"http://{host}:8080/{path}?id={m.shape('####')}&u={m.fake.slug()}",
            f"www.{host}",
            f"https://{host}/{path}#s{m.shape('#')}",
            f"ftp://{host}/{path}.zip",
        )
    )


def ip(m: Maker) -> str:
    return str(
        m.pick(
            m.fake.ipv4(),
            m.fake.ipv4_private(),
            m.fake.ipv4(),
            m.fake.ipv6(),
            "fe80::" + m.characters(4, HEX) + ":" + m.characters(3, HEX) + "1",
        )
    )


def mac(m: Maker) -> str:
    plain = m.characters(12, HEX)
    pairs = [plain[place : place + 2] for place in range(0, 12, 2)]
    return str(
        m.pick(
            ":".join(pairs), "-".join(pairs).upper(), ":".join(pairs).upper(), f"{plain[:4]}.{plain[4:8]}.{plain[8:]}"
        )
    )
