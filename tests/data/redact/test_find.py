"""Finder: what it finds, what it leaves, which span stays, and that it reads nothing but the text."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from whet.data.redact.entities import ENTITIES
from whet.data.redact.find import Finder, Span
from whet.data.redact.recognizers import fold, resolve
from whet.errors import WhetError


@pytest.fixture(scope="module")
def finder():
    return Finder(ENTITIES)


def found(finder, text):
    return {(span.entity, text[span.start : span.end]) for span in finder.find([text])[0]}


FOUND = [
    ("EMAIL", "write to <jo.o'neil+x@mail.example.co.uk>.", "jo.o'neil+x@mail.example.co.uk"),
    ("URL", "see (https://example.org/a_(b)?q=1).", "https://example.org/a_(b)?q=1"),
    ("URL", "postgres://user:pw@db.internal:5432/app", "postgres://user:pw@db.internal:5432/app"),
    ("IP", "from 10.0.0.12:443", "10.0.0.12"),
    ("IP", "peer fe80::1ff:fe23:4567:890a up", "fe80::1ff:fe23:4567:890a"),
    ("MAC", "MAC:00:1A:2b:3C:4d:5E", "00:1A:2b:3C:4d:5E"),
    ("SSN", "His social is 078-05-1120.", "078-05-1120"),
    ("SSN", "SSN 123456789", "123456789"),
    ("TAX_ID", "NIE X1234567L", "X1234567L"),
    ("TAX_ID", "Steuer-ID: 86 095 742 719", "86 095 742 719"),
    ("TAX_ID", "n° sécu 2 55 08 14 168 025 38", "2 55 08 14 168 025 38"),
    ("MRN", "patient_mrn=00123456;", "00123456"),
    ("MRN", "12345678 is my patient ID", "12345678"),
    ("ACCOUNT", "What is your account number?\nCaller: it's 99887766", "99887766"),
    ("ROUTING", "routing 021000021", "021000021"),
    ("IBAN", "iban de89 3704 0044 0532 0130 00 und", "de89 3704 0044 0532 0130 00"),
    ("SWIFT", "BIC COBADEFFXXX", "COBADEFFXXX"),
    ("CARD", "paid with 4111-1111-1111-1111 today", "4111-1111-1111-1111"),
    ("PHONE", "Tel. 030 901820", "030 901820"),
    ("PHONE", "call 415.555.0132 x12", "415.555.0132 x12"),
    ("FAX", "Fax : 01 23 45 67 89", "01 23 45 67 89"),
    ("DATE", "geboren am 3. März 1961 in Ulm", "3. März 1961"),
    ("DATE", "le mardi 1er août 2023 à 14h30", "mardi 1er août 2023 à 14h30"),
    ("DATE", "el 5 de mayo de 1990", "5 de mayo de 1990"),
    ("DATE", "on 2024-02-29T10:00:00Z.", "2024-02-29T10:00:00Z"),
    ("DATE", "March 2021", "March 2021"),
    ("AGE", "a 92-year-old man", "92"),
    ("AGE", "Elle a 101 ans.", "101"),
    ("ADDRESS", "at 12 Main Street, Apt 4B, Springfield", "12 Main Street, Apt 4B"),
    ("ADDRESS", "Hauptstraße 12a, 10115 Berlin", "10115 Berlin"),
    ("ADDRESS", "12 bis rue de l'Église, 75002 Paris", "12 bis rue de l'Église"),
    ("ADDRESS", "vive en C/ Mayor 3, 2º B", "C/ Mayor 3, 2º B"),
    ("ADDRESS", "London SW1A 2AA", "SW1A 2AA"),
    ("ZIP", "Springfield, IL 62704-1234", "62704-1234"),
    ("LOCATION", "Springfield, IL 62704-1234", "Springfield"),
    ("SSN", "Versicherungsnummer 65 180539 W 003", "65 180539 W 003"),
    ("ACCOUNT", "Kunden-Nummer: 40078211", "40078211"),
    ("PLATE", "Auto: B-KL 4711", "B-KL 4711"),
    ("PLATE", "Kennzeichen B-AB 1234", "B-AB 1234"),
    ("VIN", "a Ford 1M8GDM9AXKP042788 was", "1M8GDM9AXKP042788"),
    ("DEVICE", "IMEI 490154203237518", "490154203237518"),
    ("DEVICE", "UDI (01)00844588003288(17)141120(21)1234", "(01)00844588003288(17)141120(21)1234"),
    ("DEA", "DEA AB1234563", "AB1234563"),
    ("NPI", "NPI: 1234567893", "1234567893"),
    ("HEALTH_PLAN", "card 1EG4-TE5-MK73", "1EG4-TE5-MK73"),
    ("CAGE", "CAGE code 1ABC2", "1ABC2"),
    ("UEI", "UEI: ZQGGHJH74DW7", "ZQGGHJH74DW7"),
    ("CONTRACT", "under W912HN-21-C-0001 we", "W912HN-21-C-0001"),
    ("MARKING", "CUI//SP-PRVCY//NOFORN\nbody", "CUI//SP-PRVCY//NOFORN"),
    ("API_KEY", "aws AKIAIOSFODNN7EXAMPLE x", "AKIAIOSFODNN7EXAMPLE"),
    ("API_KEY", 'API_KEY = "q8Zr1LmX0vPd73Kt"', "q8Zr1LmX0vPd73Kt"),
    ("PASSPORT", "Reisepass-Nr. C01X00T47", "C01X00T47"),
    ("DRIVER_LICENSE", "driver's license no. D123-4567-8901", "D123-4567-8901"),
    ("LICENSE", "N.º de colegiado: 28/28/12345", "28/28/12345"),
    ("PERSON", "Patient: Ana-María López\nroom 2", "Ana-María López"),
    ("PERSON", "Viele Grüße\nJörg Müller", "Jörg Müller"),
]


@pytest.mark.parametrize(
    ("entity", "text", "value"), FOUND, ids=[f"{entity} {text[:20]!r}" for entity, text, _ in FOUND]
)
def test_finds(finder, entity, text, value):
    assert (entity, value) in found(finder, text)


def test_every_class_has_an_example():
    """Catches a class that no rule finds any more."""
    assert {entity for entity, _, _ in FOUND} | {"PRIVATE_KEY"} == set(ENTITIES)


LEFT = [
    "version 1.2.3.4 of chapter 4.5.6, released in 2019",
    "order 1234567890, part 123-45-6789, invoice 2021/1234",
    "reference 4111 1111 1111 1112 costs $1,234.56",
    "aged 89, blood pressure 120/80, room 12B, 98.6 degrees",
    "std::vector at 12:30:45, ratio 3/4, 100-200 items",
    "our CUI training; the secret is out; unclassified bugs",
    "Spring 24, Capital 3 and Recital 26 of SO313258 and part 924-94254-27",
    "a[1::2] in Clause 227.7202-4, end_token=PHI3_END; (C) 2020 AND DATA, OR PROFITS",
    "commit 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "99 Prozent in 100 Jahren, 95 years of experience",
    "@handle said hi at ten, e.g. 5 may do",
]


@pytest.mark.parametrize("text", LEFT)
def test_leaves(finder, text):
    assert found(finder, text) == set()


def test_a_private_key_goes_whole_even_when_cut_off(finder):
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc=\n-----END RSA PRIVATE KEY-----"
    assert ("PRIVATE_KEY", key) in found(finder, f"a\n{key}\nb")
    assert ("PRIVATE_KEY", key[:50]) in found(finder, f"a\n{key[:50]}")


def test_fold_keeps_offsets():
    """Catches lower(), under which 'İ' becomes two characters and every later offset is off."""
    text = "İSTANBUL ﬁ Straße ÅÉ　\uff11\uff12"
    assert len(fold(text)) == len(text)
    assert fold("ÉTÉ Größe \uff11\uff12") == "ete grose 12"


def test_offsets_hold_after_characters_beyond_the_basic_plane(finder):
    text = "🙂🙂 İ jo@example.org"
    ((span,),) = finder.find([text])
    assert text[span.start : span.end] == "jo@example.org"


def test_overlaps_go_to_score_then_length_then_start():
    spans = [Span(0, 4, "A", 0.5), Span(2, 9, "B", 0.5), Span(8, 10, "C", 0.9), Span(0, 3, "D", 0.5)]
    assert resolve(spans) == [Span(0, 4, "A", 0.5), Span(8, 10, "C", 0.9)]
    assert resolve(reversed(spans)) == resolve(spans)


def test_a_name_is_found_again_in_every_text_of_the_row(finder):
    texts = ["Patient: Ruth Quenby", "I saw Ruth Quenby. Dr. Quenby agreed; Ruthless QuenbyX did not."]
    first, second = finder.find(texts)
    assert [texts[0][span.start : span.end] for span in first] == ["Ruth Quenby"]
    assert [texts[1][span.start : span.end] for span in second] == ["Ruth Quenby", "Quenby"]


def test_rows_do_not_share_names(finder):
    finder.find(["Patient: Ruth Quenby"])
    assert finder.find(["ask Ruth Quenby"]) == [[]]


def test_only_the_classes_asked_for():
    text = "jo@example.org, 10.0.0.1, Fax 415-555-0132, Tel. 415-555-0133"
    assert {entity for entity, _ in found(Finder(["EMAIL"]), text)} == {"EMAIL"}
    assert found(Finder(["FAX"]), text) == {("FAX", "415-555-0132")}


def test_a_finder_goes_to_another_process(finder):
    """Catches a module or a local function kept in it, which no worker pool can send."""
    text = "call 030 901820, MRN 12345678"
    assert pickle.loads(pickle.dumps(finder)).find([text]) == finder.find([text])


def test_what_is_not_covered_is_said():
    finder = Finder(["PERSON", "LOCATION", "EMAIL"])
    assert set(finder.not_covered) == {"PERSON", "LOCATION"}
    assert "no NER model" in finder.not_covered["PERSON"]
    assert finder.covered == {"EMAIL"}


def test_an_unknown_class_names_the_near_one():
    with pytest.raises(WhetError, match="use EMAIL"):
        Finder(["EMAILS"])


def test_an_unknown_region_is_refused():
    """Catches a misspelt region, with which no national number would be found and nothing said."""
    with pytest.raises(WhetError, match="'UK'"):
        Finder(["PHONE"], regions=["UK"])


def test_other_regions_read_other_numbers():
    text = "appelez le 044 668 18 00"
    assert found(Finder(["PHONE"], regions=["CH"]), text) == {("PHONE", "044 668 18 00")}


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(WhetError, match=r"pip install .whet\[redact\]"):
        Finder(["PHONE"])


def test_no_heavy_import_and_no_socket():
    """Catches Presidio or spaCy drawn in by import (seconds for each worker), and any fetch of a list."""
    code = """
import socket, sys
def refuse(*arguments, **others): raise AssertionError("a socket")
socket.socket = socket.create_connection = socket.getaddrinfo = refuse
from whet.data.redact.find import Finder
from whet.data.redact.entities import ENTITIES
spans = Finder(ENTITIES).find(["Dear Ms Ortiz, jo@example.org, +1 415 555 0132, https://example.org"])[0]
assert len(spans) == 4, spans
heavy = {"spacy", "presidio_analyzer", "torch", "transformers", "tldextract"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_presidio_can_use_the_rules():
    pytest.importorskip("presidio_analyzer")
    from whet.data.redact.recognizers_presidio import presidio_recognizer

    recognizer = presidio_recognizer(["MRN", "UEI"])
    results = recognizer.analyze("MRN 12345678, UEI ZQGGHJH74DW7", entities=["MRN"])
    assert [(result.entity_type, result.start, result.end) for result in results] == [("MRN", 4, 12)]
