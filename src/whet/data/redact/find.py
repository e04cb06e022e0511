"""Finds personal and controlled data in the texts of a row.

    finder = Finder(["EMAIL", "PHONE", "PERSON"])
    finder.find(["Dear Ms Ortiz, write to a.ortiz@example.org"])      # one list of spans a text

Rules by form and by label (recognizers_*.py) read each text; a model for names and places joins them when one is given.
Where spans overlap the better score stays, then the longer, then the earlier. No rule needs spaCy or Presidio;
recognizers_presidio.py offers the same rules to a Presidio AnalyzerEngine.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from whet.data.redact import (
    recognizers_address,
    recognizers_dates,
    recognizers_finance,
    recognizers_government,
    recognizers_health,
    recognizers_identity,
    recognizers_names,
    recognizers_network,
    recognizers_secrets,
)
from whet.data.redact.entities import ENTITIES
from whet.data.redact.recognizers import ByWord, Document, Recognizer, Span, resolve
from whet.data.redact.recognizers_names import UNSURE, again
from whet.data.redact.recognizers_ner import Ner, name_model
from whet.data.redact.regions import REGIONS
from whet.errors import WhetError

__all__ = ["Finder", "Span"]

MODULES = (
    recognizers_secrets,
    recognizers_network,
    recognizers_finance,
    recognizers_identity,
    recognizers_health,
    recognizers_government,
    recognizers_dates,
    recognizers_address,
    recognizers_names,
)
ALSO = {"PHONE": ("FAX",), "ADDRESS": ("LOCATION",)}
PARTLY = {
    "PERSON": "only after titles, greetings and labels, in signatures and mail headers, and the same names elsewhere "
    "in the row",
    "LOCATION": 'only US cities before their state ("Springfield, IL") and towns in addresses',
}
"""Classes that need a model, and what is found of them without."""


class Finder:
    """Finds the classes in `entities`.

    ner:     a folder with a transformers token classifier, GLiNER or a spaCy pipeline, for names and places.
    regions: countries whose national phone numbers are read.
    covered: the classes found by form, by label or by the model; not_covered: class -> why it is not, or not fully.
    Raises WhetError for an unknown class or region, or a folder without a model; `find` for weights that can't be read.
    """

    covered: frozenset[str]
    not_covered: dict[str, str]

    def __init__(
        self,
        entities: Collection[str],
        *,
        ner: str | Path | None = None,
        regions: Sequence[str] = REGIONS,
    ) -> None:
        self.entities = frozenset(entities)
        for name in sorted(self.entities - ENTITIES.keys()):
            near = difflib.get_close_matches(name.upper(), ENTITIES, n=1)
            fix = f"use {near[0]}" if near else f"use some of {', '.join(ENTITIES)}"
            raise WhetError(f"{name!r} is no class of data", where="entities", fix=fix)
        self._recognizers = [rule for rule in self._all_recognizers(regions) if self._wanted(rule)]
        self._by_word = ByWord([rule for module in MODULES for rule in module.BY_WORD if self._wanted(rule)])
        self._model = name_model(ner) if ner is not None and self.entities & PARTLY.keys() else None
        known = self._model.entities if self._model else frozenset[str]()
        why = "the NER model has no label for it" if self._model else "no NER model was given"
        self.not_covered = {
            name: f"{partly}; {why}" for name, partly in PARTLY.items() if name in self.entities - known
        }
        self.covered = self.entities - self.not_covered.keys()

    @cached_property
    def _ner(self) -> Ner | None:
        """Read when the first texts are: whoever asks for `not_covered` alone needs no weights."""
        return self._model.load() if self._model else None

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """The spans of each text, sorted by start, none overlapping; offsets in characters of the text as given."""
        documents = [Document(text) for text in texts]
        found = [list(self._in(document)) for document in documents]
        if self._ner is not None:
            for spans, more in zip(found, self._ner(texts), strict=True):
                spans.extend(span for span in more if span.entity in self.entities)
        if "PERSON" in self.entities:
            self._add_names_again(documents, found)
        return [resolve(spans) for spans in found]

    def _in(self, document: Document) -> Iterator[Span]:
        for recognizer in self._recognizers:
            for span in recognizer.find(document):
                if span.entity in self.entities:
                    yield span
        for span in self._by_word.find(document):
            if span.entity in self.entities:
                yield span

    def _add_names_again(self, documents: Sequence[Document], found: list[list[Span]]) -> None:
        names = {
            document.text[span.start : span.end]
            for document, spans in zip(documents, found, strict=True)
            for span in spans
            if span.entity == "PERSON" and (span.score > UNSURE or " " in document.text[span.start : span.end])
        }
        for index, span in again(names, documents):
            found[index].append(span)

    def _wanted(self, rule: Recognizer) -> bool:
        """A rule may also find a neighbour of its class: faxes among phones, towns in addresses."""
        return bool(self.entities & {rule.entity, *ALSO.get(rule.entity, ())})

    def _all_recognizers(self, regions: Sequence[str]) -> Iterator[Recognizer]:
        for module in MODULES:
            yield from module.RECOGNIZERS
        if self.entities & {"PHONE", "FAX"}:
            from whet.data.redact.recognizers_phone import Phones

            yield Phones(regions)
