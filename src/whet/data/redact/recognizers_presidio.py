"""The same rules as a recognizer of Presidio, for those who already run its AnalyzerEngine.

    registry.add_recognizer(presidio_recognizer(["MRN", "UEI"]))

whet's own `Finder` does not need this module: importing Presidio loads spaCy, which takes seconds, and its engine asks
for an NLP pipeline even where only patterns are wanted.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from whet.data.redact.find import Finder
from whet.errors import WhetError


def presidio_recognizer(entities: Collection[str], *, language: str = "en", **finder: Any) -> Any:
    """A `presidio_analyzer.EntityRecognizer` that finds `entities`. finder: further arguments of `Finder`."""
    try:
        from presidio_analyzer import EntityRecognizer, RecognizerResult
    except ModuleNotFoundError as error:
        fix = 'pip install "whet[redact]"'
        raise WhetError("Presidio is not installed", where="presidio_recognizer", fix=fix) from error

    class WhetRecognizer(EntityRecognizer):
        """Runs whet's rules; scores are theirs."""

        def load(self) -> None:
            self.finder = Finder(self.supported_entities, **finder)

        def analyze(self, text: str, entities: list[str], nlp_artifacts: Any = None) -> list[Any]:
            (spans,) = self.finder.find([text])
            return [
                RecognizerResult(
                    entity_type=span.entity, start=span.start, end=span.end, score=max(0.0, min(1.0, span.score))
                )
                for span in spans
                if not entities or span.entity in entities
            ]

    return WhetRecognizer(supported_entities=sorted(entities), name="WhetRecognizer", supported_language=language)
