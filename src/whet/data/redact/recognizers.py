"""How data is recognised: by its own form (`Shape`) or by a label near it (`Labelled`).

Every rule works on a `Document`: a text, and the same text folded to lower case without accents, character for
character, so that one pattern serves all spellings and its offsets hold in the original. Labels are looked up word by
word in one dictionary, so a text pays only for the labels that are in it.

Patterns must take time linear in the text: no nested repetition, bounded gaps.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

Check = Callable[[str], bool]


class Span(NamedTuple):
    """`text[start:end]` is of the class `entity`; score in 0..1, for choosing between spans that overlap."""

    start: int
    end: int
    entity: str
    score: float


def within(text: str, start: int, end: int, entity: str, score: float) -> Span:
    """A model's span: within the text, without blanks at its ends; at most 0.8, so that check digits and forms win."""
    start, end = max(0, start), min(len(text), end)
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return Span(start, end, entity, min(score, 0.8))


def _folding() -> dict[int, str]:
    """Single characters to their lower-case ASCII look-alike; only one for one, so that offsets stay."""
    table = {}
    for code in (*range(0x00, 0x250), *range(0x1E00, 0x1F00), *range(0x2000, 0x2070), 0x3000, *range(0xFF01, 0xFF5F)):
        character = chr(code)
        base = unicodedata.normalize("NFKD", character)[:1].lower()
        if unicodedata.category(character) == "Zs":
            base = " "
        elif unicodedata.category(character) == "Pd":
            base = "-"
        if len(base) == 1 and base.isascii() and base != character:
            table[code] = base
    special = {"ß": "s", "ø": "o", "Ø": "o", "\u0131": "i", "\u2212": "-"}
    special |= dict.fromkeys("\u2018\u2019\u00b4", "'") | dict.fromkeys("\u201c\u201d", '"')
    return table | {ord(character): to for character, to in special.items()}


FOLDING = _folding()
WORD = re.compile(r"[^\W\d_]+")


def fold(text: str) -> str:
    """Lower case, no accents, plain dashes, quotes and spaces; `len(fold(text)) == len(text)`."""
    return text.translate(FOLDING)


class Document:
    """One text, ready for the rules."""

    def __init__(self, text: str):
        self.text = text
        self.folded = fold(text)

    @cached_property
    def words(self) -> list[tuple[str, int]]:
        """(word, where it starts), folded."""
        return [(match.group(), match.start()) for match in WORD.finditer(self.folded)]

    @cached_property
    def has_digit(self) -> bool:
        return DIGIT.search(self.folded) is not None

    def before(self, start: int, length: int = 32) -> str:
        return self.folded[max(0, start - length) : start]


DIGIT = re.compile("[0-9]")


class Recognizer(Protocol):
    entity: str

    def find(self, document: Document) -> Iterable[Span]: ...


OTHER_NUMBER = re.compile(
    r"(?<![a-z])(?:invoices?|inv|orders?|po|purchase|part|parts|p/n|sku|versions?|ver|v|release|build|firmware|"
    r"tickets?|case|batch|lot|model|items?|articles?|quotes?|tracking|parcel|shipment|room|page|section|chapter|table|"
    r"figure|"
    r"references?|ref|rechnung(?:en)?|rechnungs\S{0,8}|bestellung(?:en)?|bestell\S{0,8}|auftrag|auftrags\S{0,8}|"
    r"artikel\S{0,8}|teile\S{0,8}|charge(?:n|nnummer)|vorgang\S{0,8}|sendung\S{0,8}|angebot\S{0,8}|seite|kapitel|"
    r"facture|commande|devis|lot|colis|piece|reference produit|chapitre|"
    r"factura|pedido|albaran|presupuesto|lote|pieza|articulo|referencia de producto|capitulo|pagina)(?![a-z])"
)
"""Words that say that the number after them is something else."""

OTHER_BEFORE = re.compile(OTHER_NUMBER.pattern + r"(?:[\s.:#=\-]|no|number|nr|num|numero|nummer|is|ist|es|est){0,6}$")

SENTENCE_END = re.compile(r"(?<!\bno)(?<!\bnr)(?<!\bnum)(?<!\bn)(?<!\bid)[.!;]\s+[a-z]")


@dataclass(frozen=True)
class Shape:
    """Data whose form is enough.

    pattern: the value is its group 1 where it has one, else all of it.
    check:   what the value must pass, as a check digit; given as matched.
    hints:   folded texts of which the document must hold one, so that most documents skip the pattern.
    needs:   what must be found in the folded text, for the same purpose.
    unless:  what must not be found in the 32 folded characters before the value.
    cased:   search the text itself, not its folded form.
    """

    entity: str
    pattern: re.Pattern[str]
    score: float
    check: Check | None = None
    hints: tuple[str, ...] = ()
    needs: re.Pattern[str] | None = None
    unless: re.Pattern[str] | None = None
    cased: bool = False
    digits: bool = True

    def find(self, document: Document) -> Iterator[Span]:
        if self.digits and not document.has_digit:
            return
        if self.hints and not any(hint in document.folded for hint in self.hints):
            return
        if self.needs is not None and self.needs.search(document.folded) is None:
            return
        group = 1 if self.pattern.groups else 0
        for match in self.pattern.finditer(document.text if self.cased else document.folded):
            start, end = match.span(group)
            if self.check is not None and not self.check(match.group(group)):
                continue
            if self.unless is not None and self.unless.search(document.before(start)):
                continue
            yield Span(start, end, self.entity, self.score)


QUALIFIERS = r"(?:[\s_.\-]{0,2}(?:numbers?|no|nos|nr|num|nummern?|numero|n|id|ids|code|#|°|º)(?![a-z]))*"
GAP = r"(?P<gap>[^0-9]{0,40}?)"
NEAR = (
    r"(?P<gap>(?:[\s:=#\-.(\"'|>*?]|is |was |are |lautet |ist |war |est |etait |es |era |the |wie folgt |with |mit "
    r"){0,8}|[^0-9]{0,30}?[:=#(\"'?][\s\"']{0,2}(?:sure, |it's |it is |c'est |es |si, es |ja, |die lautet |voila : )?)"
)
"""GAP: a few words. NEAR: punctuation and "is", for labels that are also common words."""
LIST = r"\s{0,3}(?:,|/|&|and|und|et|y|or|oder|ou|o)\s{1,3}"


@dataclass(frozen=True)
class Labelled:
    """Data that a label gives away: before it with a few words between, or right after it.

    labels: as people write them, in any of the languages; a space stands for any joint ("account number",
            "account_no", "accountNumber").
    value:  a pattern over folded text, without groups.
    check:  a check digit; a value that fails it is still found, as a misprint, unless `strict`.
    gap:    GAP or NEAR.
    digits: every value holds a digit.
    lazy:   "no", "nr" and the like after the label are rather part of the value.
    """

    entity: str
    labels: tuple[str, ...]
    value: str
    score: float = 0.8
    check: Check | None = None
    strict: bool = False
    gap: str = GAP
    digits: bool = True
    lazy: bool = False
    pattern: re.Pattern[str] = field(init=False, repr=False)
    more: re.Pattern[str] = field(init=False, repr=False)
    label_only: re.Pattern[str] = field(init=False, repr=False)
    value_last: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = sorted(self._folded_labels, key=lambda word: (-len(word), word))
        label = "|".join(r"[\s_.\-]{0,2}".join(map(re.escape, word.split(" "))) for word in words)
        value = rf"(?<![a-z0-9])(?=[a-z0-9*])(?P<value>{self.value})(?![a-z0-9])"
        qualifiers = QUALIFIERS + ("?" if self.lazy else "")
        compiled = {
            "pattern": rf"(?P<label>(?:{label}){qualifiers})(?![a-z]){self.gap}{value}",
            "more": rf"{LIST}{value}(?!\s?[:=])",
            "label_only": rf"(?:{label})(?![a-z])",
            "value_last": rf"{value}$",
        }
        for name, pattern in compiled.items():
            object.__setattr__(self, name, re.compile(pattern))

    @property
    def _folded_labels(self) -> set[str]:
        """German compounds also taken apart: "Kontonummer", "Konto-Nummer", "Konto-Nr."."""
        labels = set(map(fold, self.labels))
        stems = {label.removesuffix("nummer") for label in labels if label.endswith("nummer") and len(label) > 8}
        return labels | {f"{stem} {end}" for stem in stems for end in ("nummer", "nr")}

    @property
    def first_words(self) -> set[str]:
        """What a label may begin with, as `WORD` cuts it out of a folded text."""
        starts: set[str] = set()
        for label in self._folded_labels:
            parts = label.split(" ")
            for joined in ("".join(parts[: length + 1]) for length in range(len(parts))):
                if (word := WORD.match(joined)) is not None:
                    starts.add(word.group())
        return starts

    def at(self, document: Document, position: int) -> Iterator[Span]:
        """The values whose label starts at `position`."""
        text = document.folded
        match = self.pattern.match(text, position)
        if match is None or _is_of_something_else(match["gap"]):
            return
        label, gap = len(match["label"]), len(match["gap"])
        nearness = min(0.04, label * 0.002) - gap * 0.002
        while match is not None:
            if (score := self._score(match["value"])) > 0:
                yield Span(*match.span("value"), self.entity, score + nearness)
            match = self.more.match(text, match.end())

    def before(self, document: Document, end: int, label: int) -> Iterator[Span]:
        """The value that ends at `end`, where a label starts at `label`: "12345 is my account number"."""
        if self.label_only.match(document.folded, label) is None:
            return
        start = max(0, end - 32)
        match = self.value_last.search(document.folded[start:end])
        if match is not None and (score := self._score(match["value"])) > 0:
            yield Span(start + match.start("value"), end, self.entity, score - 0.1)

    def _score(self, value: str) -> float:
        if self.check is None:
            return self.score
        if self.check(value):
            return max(self.score, 0.95)
        return 0.0 if self.strict else self.score - 0.15


def _is_of_something_else(gap: str) -> bool:
    if len(gap) < 3:
        return gap == "/"  # a label that is part of a reference: "SN/9867/40"
    return gap.count("\n") > 2 or SENTENCE_END.search(gap) is not None or OTHER_NUMBER.search(gap) is not None


@dataclass(frozen=True)
class Anchored:
    """Data that starts with, or right after, certain words.

    words:   folded; where one of them stands, the pattern is tried from its start. The value is group 1, or all.
    """

    entity: str
    words: tuple[str, ...]
    pattern: re.Pattern[str]
    score: float
    check: Check | None = None
    cased: bool = True

    @property
    def first_words(self) -> set[str]:
        return set(self.words)

    def at(self, document: Document, position: int) -> Iterator[Span]:
        match = self.pattern.match(document.text if self.cased else document.folded, position)
        if match is not None:
            group = match.lastindex or 0
            if self.check is None or self.check(match.group(group)):
                yield Span(*match.span(group), self.entity, self.score)


class ByWord:
    """Every rule that starts with a word, behind one dictionary: a document is read once for all of them."""

    def __init__(self, rules: Sequence[Labelled | Anchored]):
        self._labelled: dict[str, list[Labelled]] = {}
        self._anchored: dict[str, list[Anchored]] = {}
        for rule in rules:
            for word in sorted(rule.first_words):
                if isinstance(rule, Labelled):
                    self._labelled.setdefault(sys.intern(word), []).append(rule)
                else:
                    self._anchored.setdefault(sys.intern(word), []).append(rule)

    def find(self, document: Document) -> Iterator[Span]:
        for word, position in document.words:
            for anchored in self._anchored.get(word, ()):
                yield from anchored.at(document, position)
            if word in self._labelled and not document.folded[position - 1 : position].isdecimal():
                digit = DIGIT.search(document.folded, position, position + REACH) is not None
                for rule in self._labelled[word]:
                    if digit or not rule.digits:
                        yield from rule.at(document, position)
        if document.has_digit:
            yield from self._before_labels(document)

    def _before_labels(self, document: Document) -> Iterator[Span]:
        for match in IS_MY.finditer(document.folded):
            word = WORD.match(document.folded, match.end())
            for rule in self._labelled.get(word.group(), ()) if word is not None else ():
                yield from rule.before(document, match.start(), match.end())


REACH = 100  # characters from a label's start within which its value begins
IS_MY = re.compile(
    r"(?<=[0-9a-z])\s?(?:\(|is (?:my|the|his|her|our|their) |ist (?:meine|die|seine|ihre) |est (?:mon|le|son|ma|la) |"
    r"es (?:mi|el|su|la) )(?:the |your |su |tu |le |la )?"
)


def resolve(spans: Iterable[Span]) -> list[Span]:
    """The spans that stay where some overlap: the best score, then the longest, then the first; sorted by start."""
    kept: list[Span] = []
    taken = bytearray()
    for span in sorted(spans, key=lambda span: (-span.score, span.start - span.end, span.start, span.entity)):
        if span.end > len(taken):
            taken.extend(bytes(span.end - len(taken)))
        if not any(taken[span.start : span.end]):
            taken[span.start : span.end] = b"\x01" * (span.end - span.start)
            kept.append(span)
    return sorted(kept)
