"""Names of people by what stands around them: titles, greetings, signatures, labels, introductions, mail headers.

This is what can be had without a model that knows names; a name in running prose with nothing around it is not found.
Names found in one text of a row are looked for in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from whet.data.redact.recognizers import WORD, Anchored, Document, Span, fold

CAP = (
    r"(?:[A-ZÀ-ÖØ-Þ][a-zß-öø-ÿ'\u2019]{1,24}(?:[A-Z][a-zß-öø-ÿ]{1,20})?|"
    r"[A-Z]['\u2019][A-Z][a-zß-öø-ÿ]{1,24})(?:-[A-ZÀ-ÖØ-Þ][a-zß-öø-ÿ]{1,24})*"
)
UPPER = r"[A-ZÀ-ÖØ-Þ]{2,24}(?:[-'\u2019][A-ZÀ-ÖØ-Þ]{2,24})*"
PARTICLE = r"(?:(?:von|van|zu|zur|vom|der|den|de|du|del|la|le|las|los|y|da|di|bin|al)[ \t]){0,3}"
NAME = rf"{CAP}(?:[ \t](?:[A-Z]\.[ \t])?{PARTICLE}(?:{CAP}|{UPPER}(?![a-z]))){{0,3}}"
FULL = rf"{CAP}(?:[ \t](?:[A-Z]\.[ \t])?{PARTICLE}(?:{CAP}|{UPPER}(?![a-z]))){{1,3}}"
ANY = rf"(?:{NAME}|{UPPER}(?:[ \t]{UPPER}){{0,3}}(?![a-z]))"
TITLES = (
    "Mr", "Mrs", "Ms", "Mx", "Miss", "Dr", "Prof", "Professor", "Sir", "Dame", "Lord", "Lady", "Rev", "Capt",
    "Captain", "Sgt", "Lt", "Col", "Maj",
    "Officer", "Detective", "Judge", "Nurse", "Herr", "Herrn", "Frau", "Hr", "Fr", "Doktor", "M", "MM", "Mme", "Mlle",
    "Monsieur", "Madame",
    "Mademoiselle", "Docteur", "Maître", "Pr", "Sr", "Sra", "Srta", "Señor", "Señora", "Señorita", "señor", "señora",
    "Don", "Doña", "don", "doña", "D",
    "Dña", "Doctor", "Doctora", "Dra", "MR", "MRS", "MS", "DR", "HERR", "FRAU", "MME", "SR", "SRA", "mr", "mrs", "dr",
)  # fmt: skip
GREETINGS = (
    "Dear", "Hi", "Hello", "Hey", "Good morning", "Good afternoon", "Good evening", "Good morning,", "Liebe", "Lieber",
    "liebe", "lieber", "Hallo",
    "Guten Tag", "Guten Morgen", "Moin", "Bonjour", "Bonsoir", "Salut", "Cher", "Chère", "Hola", "Estimado",
    "Estimada", "Querido", "Querida",
    "Buenos días", "Buenas tardes",
)  # fmt: skip
CLOSINGS = (
    "regards", "kind regards", "best regards", "warm regards", "best wishes", "sincerely", "yours sincerely",
    "yours truly", "many thanks", "thanks", "thank you",
    "cheers", "best", "mit freundlichen grüßen", "mit freundlichem gruß", "freundliche grüße", "herzliche grüße",
    "viele grüße", "liebe grüße", "beste grüße",
    "schöne grüße", "grüße", "gruß", "vg", "lg", "mfg", "cordialement", "bien cordialement", "salutations",
    "bien à vous", "à bientôt", "merci", "saludos", "un saludo",
    "saludos cordiales", "un cordial saludo", "atentamente", "cordialmente", "gracias", "un abrazo",
)  # fmt: skip
LABELS = (
    "name", "names", "full name", "patient name", "customer name", "client name", "first name", "last name",
    "middle name", "family name", "contact name",
    "employee name", "user name", "legal name", "cardholder name", "account holder name", "guarantor name", "patient",
    "surname", "customer", "client",
    "employee", "attending", "physician", "provider", "referring", "author", "signed", "signed by", "prepared by",
    "reported by", "assigned to", "requested by",
    "agent", "witness", "driver", "caller", "contact", "contact person", "sent by", "received by", "seen by",
    "reviewed by", "next of kin", "emergency contact",
    "account holder", "cardholder", "attn", "attention", "mother", "father", "spouse", "guardian", "tenant",
    "landlord", "lessee", "buyer", "seller", "payee",
    "nachname", "vorname", "vor- und nachname", "familienname", "kunde", "kundin", "patientin", "versicherter",
    "versicherte", "fahrer", "fahrerin", "mieter",
    "mieterin", "vermieter", "vermieterin", "ansprechpartner", "ansprechpartnerin", "arzt", "ärztin",
    "behandelnder arzt", "sachbearbeiter", "sachbearbeiterin",
    "kontoinhaber", "kontoinhaberin", "absender", "empfänger", "nom", "nom et prénom", "prénom", "nom de famille",
    "patiente", "titulaire", "médecin",
    "médecin traitant", "assuré", "locataire", "bailleur", "destinataire", "expéditeur", "signataire", "conducteur",
    "conductrice", "nombre",
    "nombre y apellidos", "nombre completo", "apellido", "apellidos", "paciente", "titular", "cliente", "médico",
    "asegurado", "arrendatario", "arrendador",
    "destinatario", "remitente", "conductor", "conductora", "firmado", "firmado por",
)  # fmt: skip
INTRODUCTIONS = (
    "my name is", "my name's", "this is", "name is", "ich heiße", "mein name ist", "je m'appelle", "mon nom est",
    "me llamo", "mi nombre es", "called me",
    "named", "speaking with", "spoke to", "spoke with",
)  # fmt: skip
I_AM = ("I am", "I'm", "i am", "Ich bin", "ich bin", "Hier ist", "hier ist", "Je suis", "je suis", "Soy", "soy")
HEADERS = ("From", "To", "Cc", "CC", "Bcc", "Von", "An", "De", "À", "A", "Para", "Reply-To")
KIN = (
    "daughter", "son", "wife", "husband", "sister", "brother", "tochter", "sohn", "ehefrau", "ehemann", "schwester",
    "bruder", "fille", "fils", "épouse",
    "époux", "hija", "hijo", "esposa", "marido", "next of kin", "neighbour", "neighbor", "señora", "frau", "zwischen",
    "between", "entre",
)  # fmt: skip
BORN = re.compile(
    rf"(?<![\w])({FULL}),?[ \t]\(?(?:born|DOB|D\.O\.B\.|date of birth|geb\.|geboren|né\(e\)|née?|nacid[oa]|demeurant|"
    rf"domicilié|residing|residente|wohnhaft|con domicilio)"
)
BORN_HINT = re.compile(
    r"[ (](?:born|dob|d\.o\.b|date of b|geb|nee?|nacid|demeurant|domicili|resid|wohnhaft|con "
    r"domicilio)"
)
SURE, UNSURE = 0.72, 0.71  # one word after "Name:" may name a product: it is not looked for elsewhere
NAME_END = r"(?=[ \t]*(?:$|[\n,;|(\"<\]]|[ \t]{2}))"


def _any(words: tuple[str, ...]) -> str:
    """One of them; a straight apostrophe also as a curly one."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return "(?:" + "|".join(re.escape(word).replace("'", "['\u2019]") for word in ordered) + ")"


class Triggered(Anchored):
    """A PERSON after one of the words; words that start a sentence or name a role are none."""

    def __init__(self, words: tuple[str, ...], pattern: str, score: float = SURE):
        firsts = {match.group() for word in words if (match := WORD.match(fold(word))) is not None}
        super().__init__("PERSON", tuple(sorted(firsts)), re.compile(pattern), score, _is_name)


def _is_name(value: str) -> bool:
    first = value.split()[0].rstrip(",")
    return first not in TITLES and first.casefold() not in NOT_NAMES


TITLED = rf"(?:{_any(TITLES)}\.?[ \t]{{1,2}})"
SEPARATOR = r"(?:\(s\))?[\"']?[ \t]{0,3}(?:[:=]|-(?=[ \t])|\|)[ \t]{0,3}[\"']?"
LINE_START = r"(?<![^\n>:\",][ \t])(?<![^\n>:\" \t])"
REVERSED = rf"{CAP},[ \t]{CAP}"
BY_WORD = (
    Triggered(TITLES, rf"{TITLED}{{1,3}}(?:med\.[ \t]|-Ing\.[ \t]|jur\.[ \t])?({ANY})"),
    Triggered(GREETINGS, rf"{LINE_START}{_any(GREETINGS)}[ \t]({NAME})(?=[ \t]?[,!.:;\n\u2013-]|$)"),
    Triggered(
        CLOSINGS,
        rf"(?i:{_any(CLOSINGS)})[,.!]?[ \t]*\n\s{{0,4}}(?:--[ \t]?\n)?({ANY})(?=[ \t]*(?:\n|$|,|\(|"
        rf"\|))",
    ),
    Triggered(LABELS, rf"(?i:{_any(LABELS)}){SEPARATOR}{TITLED}{{0,2}}({REVERSED}|{FULL}|{ANY}{NAME_END})", UNSURE),
    Triggered(INTRODUCTIONS, rf"(?i:{_any(INTRODUCTIONS)})[ \t]({NAME})"),
    Triggered(I_AM, rf"{_any(I_AM)}[ \t]({FULL})(?=[ \t]?[,.!;\n(]|[ \t](?:and|from|und|von|et|de|y|aus)[ \t]|$)"),
    Triggered(
        HEADERS,
        rf"(?<![^\n]){_any(HEADERS)}[ \t]?:[ \t]*\"?({REVERSED}|{ANY})\"?[ \t]*(?=<|\[|\(|$|;|,|\n|[ \t]{{2}})",
    ),
    Triggered(KIN, rf"(?i:{_any(KIN)})[ \t]({FULL})"),
)
BEFORE_ADDRESS = re.compile(rf"(?<![\w])({FULL})\"?[ \t]?(?=<[\w.+\-]{{1,64}}@)")
BEFORE_DEGREE = re.compile(
    rf"(?<![\w])({FULL}),?[ \t](?:MD|M\.D\.|DO|RN|NP|PA-C|PhD|Ph\.D\.|Esq\.?|DDS|PharmD)(?![\w])"
)
DEGREE = re.compile(r"[ \t](?:MD|M\.D\.|DO|RN|NP|PA-C|PhD|Ph\.D\.|Esq|DDS|PharmD)(?![\w])")
ROLES_AND_OPENINGS = (
    "Hallo Moment Medical Patient Insurance Thanks And Thank Hello Hi Sure Ok Okay Gracias Merci Danke Could May "
    "Where Was What When How Which Who Can Is It In On At For Sir Madam Team All Customer Customers Everyone "
    "Support There Friends Colleagues Valued Hiring Manager Sirs Client Doctor Kunde Kundin Damen Herren Kollegen "
    "Kolleginnen Zusammen Alle Madame Monsieur Messieurs Mesdames Tous Cliente Equipo Señores Señor Señora Todos "
    "Amigos The This That Please Phone Tel Email E-Mail Address Date Number Unknown None Null True False Yes No "
    "Not Invoice Order Account Name Id Sehr Guten Tag Our Your My We You Re Fwd Subject Betreff Objet Asunto Hr "
    "Herr Frau Nom Nombre DOB SSN MRN NPI January February March April June July August September October "
    "November December Admin Service Dept Department Sales Billing Info Kundenservice Kundendienst Soporte "
)
NOT_NAMES = frozenset(ROLES_AND_OPENINGS.casefold().split())


class Names:
    """Names before an address in angle brackets, a degree, or a birth."""

    entity = "PERSON"

    def find(self, document: Document) -> Iterator[Span]:
        if "<" in document.text:
            yield from self._matches(BEFORE_ADDRESS, document)
        if DEGREE.search(document.text) is not None:
            yield from self._matches(BEFORE_DEGREE, document)
        if BORN_HINT.search(document.folded) is not None:
            yield from self._matches(BORN, document)

    def _matches(self, pattern: re.Pattern[str], document: Document) -> Iterator[Span]:
        for match in pattern.finditer(document.text):
            if _is_name(match.group(1)):
                yield Span(*match.span(1), self.entity, SURE)


def again(names: Iterable[str], documents: Sequence[Document]) -> Iterator[tuple[int, Span]]:
    """(index of the document, span) of every whole name in `names`, wherever it stands as words of their own."""
    for name in sorted({name for name in names if len(name) >= 3}):
        for index, document in enumerate(documents):
            text = document.text
            start = text.find(name)
            while start >= 0:
                end = start + len(name)
                if not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum()):
                    yield index, Span(start, end, "PERSON", UNSURE)
                start = text.find(name, end)


RECOGNIZERS = (Names(),)
