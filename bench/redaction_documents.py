"""Labelled documents for measuring redaction: seeded, in five locales, from the templates in redaction_templates/.

    for document in documents(count=5000, seed=7): document.text, document.labels

A template is text with [choices|of words] and {slots}: {CLASS} puts in a value, {CLASS!} a label and a value, ~ some
separator, {FIELDS:layout} a form of eight labelled values, {ASK:CLASS,CLASS} a question and its answer in a chat, and
small letters a near-miss of no class (order numbers, versions, years, ages under 90, numbers with a wrong check digit).
Labels vary in wording and case, separators in kind. The same seed gives the same documents with the same Faker.

The templates and labels were written for this purpose and are cleaner than records of the world; what a recognizer
reaches here is more than it will reach there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import redaction_numbers as numbers
import redaction_values as values
from faker import Faker
from redaction_labels import LABELS
from redaction_near_misses import NEAR_MISSES
from redaction_values import Maker, Parts

TEMPLATES = Path(__file__).with_name("redaction_templates")
LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES")
SEPARATORS = (": ", ": ", ": ", " : ", ":", " ", " = ", ":  ", " - ", ":\t")
TOKEN = re.compile(r"\[([^\[\]\n]*?\|[^\[\]\n]*?)\]|\{(\w+)(!?)(?::([\w,]+))?\}|~")
LAYOUTS = {"lines": ("\n", 8), "semicolon": ("; ", 8), "pipe": (" | ", 8), "json": (",\n  ", 8)}
SPEAKERS = {"en_US": ("Customer", "Caller", "Me"), "en_GB": ("Customer", "Me"), "de_DE": ("Kunde", "Kundin"),
    "fr_FR": ("Client", "Cliente"), "es_ES": ("Cliente",)}  # fmt: skip
ANSWERS = {"en": ("", "it's ", "It is ", "sure, "), "de": ("", "die lautet ", "Moment, "), "fr": ("", "c'est ",
    "voilà : "), "es": ("", "es ", "sí, es ")}  # fmt: skip
MAKERS: dict[str, Any] = {
    "PERSON": values.person, "ADDRESS": values.address, "DATE": values.date, "PHONE": values.phone,
    "FAX": values.phone, "EMAIL": values.email,
    "URL": values.url, "IP": values.ip, "MAC": values.mac, "SSN": numbers.ssn, "TAX_ID": numbers.tax_id,
    "DRIVER_LICENSE": numbers.driver_license,
    "PASSPORT": lambda m: m.shape(m.pick(*numbers.PASSPORTS[m.country])), "LICENSE": numbers.license_number,
    "MRN": numbers.mrn,
    "HEALTH_PLAN": numbers.health_plan, "NPI": numbers.npi, "DEA": numbers.dea, "ACCOUNT": numbers.account,
    "ROUTING": numbers.routing,
    "IBAN": numbers.iban, "SWIFT": numbers.swift, "CARD": numbers.card, "PLATE": numbers.plate, "VIN": numbers.vin,
    "DEVICE": numbers.device,
    "CAGE": numbers.cage, "UEI": numbers.uei, "CONTRACT": numbers.contract, "MARKING": numbers.marking,
    "API_KEY": numbers.api_key,
    "PRIVATE_KEY": numbers.private_key, "ZIP": numbers.zip_code,
}  # fmt: skip
SPECIAL: dict[str, tuple[str, Any]] = {
    "LOGTIME": ("DATE", values.log_time),
    "DATETIME": ("DATE", values.date_time),
    "RFCDATE": ("DATE", values.rfc_date),
    "LAST": ("PERSON", lambda m: m.fake.last_name()),
    "FIRST": ("PERSON", lambda m: m.fake.first_name()),
    "MARKING_LINE": ("MARKING", numbers.marking),
}


class Label(NamedTuple):
    """`text[start:end]` is of the class `entity`."""

    start: int
    end: int
    entity: str


@dataclass(frozen=True)
class LabelledDocument:
    text: str
    labels: list[Label]
    locale: str
    template: str


def documents(count: int, seed: int) -> Iterator[LabelledDocument]:
    """`count` documents, the locales and their templates in turn."""
    makers = {}
    for locale in LOCALES:
        fake = Faker(locale)
        fake.seed_instance(f"{seed} {locale}")
        makers[locale] = Maker(random.Random(f"{seed} {locale}"), fake, locale)
    for number in range(count):
        locale = LOCALES[number % len(LOCALES)]
        templates = load_templates(locale)
        name = sorted(templates)[number // len(LOCALES) % len(templates)]
        yield _document(makers[locale], name, templates[name])


@cache
def load_templates(locale: str) -> dict[str, str]:
    """Text by name."""
    sections = re.split(r"^=== ", (TEMPLATES / f"{locale}.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: text.strip("\n") for name, _, text in (section.partition("\n") for section in sections)}


def _document(maker: Maker, name: str, template: str) -> LabelledDocument:
    text, labels = "", []
    for part, entity in _expand(maker, template):
        if entity is not None:
            labels.append(Label(len(text), len(text) + len(part), entity))
        text += part
    return LabelledDocument(text, labels, maker.locale, name)


def _expand(maker: Maker, template: str) -> Parts:
    parts: Parts = []
    position = 0
    for match in TOKEN.finditer(template):
        parts.append((template[position : match.start()], None))
        position = match.end()
        choices, slot, labelled, argument = match.groups()
        if choices is not None:
            parts += _expand(maker, maker.pick(*choices.split("|")))
        elif slot is None:
            parts.append((maker.pick(*SEPARATORS), None))
        else:
            parts += _slot(maker, slot, bool(labelled), argument)
    return [*parts, (template[position:], None)]


def _slot(maker: Maker, slot: str, labelled: bool, argument: str | None) -> Parts:
    if slot in NEAR_MISSES:
        return [(str(NEAR_MISSES[slot](maker)), None)]
    if slot == "FIELDS":
        return _fields(maker, argument or "lines")
    if slot == "ASK":
        return _ask(maker, (argument or "").split(","))
    if slot in ("old", "old_number", "old_or_not"):
        return _age(maker, slot)
    if labelled:
        return _labelled(maker, slot, maker.pick(*SEPARATORS))
    entity, make = SPECIAL[slot] if slot in SPECIAL else (slot, MAKERS[slot])
    made = make(maker)
    return made if isinstance(made, list) else [(made, entity)]


def _age(maker: Maker, slot: str) -> Parts:
    if slot == "old":
        return values.old(maker)
    if slot == "old_or_not" and maker.rng.random() < 0.5:
        return [(str(maker.rng.randrange(20, 90)), None)]
    return [(values.old_number(maker), "AGE")]


def _value(maker: Maker, entity: str, label: str) -> Parts:
    """A value that fits its label: an EIN for "EIN"."""
    make = MAKERS[entity]
    takes = signature(make).parameters
    made = make(maker, **({"label": label} if "label" in takes else {"labelled": True} if "labelled" in takes else {}))
    if label == "Last 4 of SSN":
        made = made[-4:]
    return made if isinstance(made, list) else [(made, entity)]


def _labelled(maker: Maker, entity: str, separator: str) -> Parts:
    label = maker.pick(*LABELS[maker.locale][entity])
    shown = maker.pick(label, label, label, label, label.upper(), label.lower())
    return [(shown + separator, None), *_value(maker, entity, label)]


def _fields(maker: Maker, layout: str) -> Parts:
    joint, count = LAYOUTS[layout]
    parts: Parts = [("{\n  ", None)] if layout == "json" else []
    separator = maker.pick(*SEPARATORS)
    entities = maker.rng.sample(sorted(LABELS[maker.locale]), count)
    for place, entity in enumerate(entities):
        if place:
            parts.append((joint, None))
        if layout == "json":
            (label, _), *value = _labelled(maker, entity, "")
            parts += [(f'"{label}": "', None), *((text.replace("\n", ", "), kind) for text, kind in value), ('"', None)]
        else:
            parts += _labelled(maker, entity, separator)
    return [*parts, ("\n}", None)] if layout == "json" else parts


def _ask(maker: Maker, entities: list[str]) -> Parts:
    entity = maker.pick(*entities)
    label = maker.pick(
        *(label for label in LABELS[maker.locale][entity] if "#" not in label and not label.endswith(" is"))
    )
    answer = f"?\n{maker.pick(*SPEAKERS[maker.locale])}: {maker.pick(*ANSWERS[maker.language])}"
    return [(label + answer, None), *_value(maker, entity, label)]
