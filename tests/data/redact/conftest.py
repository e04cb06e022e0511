"""A key, and a finder that needs no library: a pattern a class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from whet.data.redact.find import Span

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))

PATTERNS = {
    "EMAIL": r"[\w.-]+@[\w-]+\.\w+",
    "SSN": r"\b\d{3}-\d{2}-\d{4}\b",
    "CARD": r"\b\d{4}(?: \d{4}){3}\b",
    "PHONE": r"(?:\+1[- ])?\(?\b\d{3}\)?[- ]\d{3}-\d{4}\b",
    "IP": r"\b\d{1,3}(?:\.\d{1,3}){3}\b",
    "DATE": r"\b\d{4}-\d{2}-\d{2}\b",
    "ZIP": r"\b\d{5}(?:-\d{4})?\b",
    "AGE": r"\b\d{2,3}(?= years old)",
    "MRN": r"(?<=MRN )[\w-]+",
    "PERSON": r"(?<=Dr\. )[A-Z][\w-]+(?: [A-Z][\w-]+)?",
}


@dataclass
class PatternFinder:
    """Finds by patterns; where two meet, the one that starts first wins, then the longer."""

    patterns: dict[str, str] = field(default_factory=lambda: dict(PATTERNS))
    not_covered: dict[str, str] = field(default_factory=dict)

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        return [self._of(text) for text in texts]

    def _of(self, text: str) -> list[Span]:
        hits = [
            Span(*match.span(), entity, 1.0)
            for entity, pattern in self.patterns.items()
            for match in re.finditer(pattern, text)
            if match[0]
        ]
        kept: list[Span] = []
        for span in sorted(hits, key=lambda span: (span.start, -span.end)):
            if not kept or span.start >= kept[-1].end:
                kept.append(span)
        return kept
