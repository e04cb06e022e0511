"""Recall and precision of spans against labels, class by class.

A label is *found* when every letter and digit of it lies in spans of its own class: one character left is a miss,
blanks and punctuation do not count. It is *redacted* when they lie in spans of any class. A span is *right* when at
least half of its letters and digits lie in labels of its class, so that a title before a name does no harm, but a
phone number taken for an account does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redaction_documents import Label, LabelledDocument


@dataclass
class Score:
    labels: int = 0
    found: int = 0
    redacted: int = 0
    spans: int = 0
    right: int = 0

    @property
    def recall(self) -> float | None:
        return round(self.found / self.labels, 5) if self.labels else None

    @property
    def precision(self) -> float | None:
        return round(self.right / self.spans, 5) if self.spans else None

    def as_json(self) -> dict[str, Any]:
        redacted = round(self.redacted / self.labels, 5) if self.labels else None
        return asdict(self) | {"recall": self.recall, "precision": self.precision, "redacted_share": redacted}


Found = tuple[int, int, frozenset[str]]
"""Start, end and class of a span; several classes where an engine does not tell them apart."""


def score(pairs: Iterable[tuple[LabelledDocument, Sequence[Found]]]) -> dict[str, Score]:
    """By class, over documents and the spans an engine found in each."""
    scores: dict[str, Score] = defaultdict(Score)
    for document, spans in pairs:
        for label, found, redacted in judged_labels(document, spans):
            one = scores[label.entity]
            one.labels, one.found, one.redacted = one.labels + 1, one.found + found, one.redacted + redacted
        for _, entity, right in judged_spans(document, spans):
            one = scores[entity]
            one.spans, one.right = one.spans + 1, one.right + right
    return dict(scores)


def judged_labels(document: LabelledDocument, spans: Sequence[Found]) -> Iterable[tuple[Label, bool, bool]]:
    """(label, found, redacted) of each label."""
    for label in document.labels:
        needed = _characters(document.text, label.start, label.end)
        covered: set[int] = set()
        own: set[int] = set()
        for start, end, entities in spans:
            if start < label.end and label.start < end:
                covered.update(range(start, end))
                if label.entity in entities:
                    own.update(range(start, end))
        yield label, needed <= own, needed <= covered


def judged_spans(document: LabelledDocument, spans: Sequence[Found]) -> Iterable[tuple[Found, str, bool]]:
    """(span, its class, right) of each span; of several classes the one that its labels speak for."""
    for span in spans:
        start, end, entities = span
        characters = _characters(document.text, start, end)
        inside = dict.fromkeys(sorted(entities), 0)
        for label in document.labels:
            if label.entity in inside:
                inside[label.entity] += len(characters & set(range(label.start, label.end)))
        entity = max(inside, key=lambda name: (inside[name], name))
        yield span, entity, bool(characters) and 2 * inside[entity] >= len(characters)


def _characters(text: str, start: int, end: int) -> set[int]:
    return {place for place in range(start, end) if text[place].isalnum()}
