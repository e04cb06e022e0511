"""Names and places by a model in a folder: a transformers token classifier, GLiNER, or a spaCy pipeline.

Nothing is fetched, no code that came with the model runs, and weights are read from safetensors only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from whet.data.redact.recognizers import Span
from whet.errors import WhetError

Ner = Callable[[Sequence[str]], list[list[Span]]]
"""Texts to the PERSON and LOCATION spans of each."""

LABELS = {
    "per": "PERSON", "person": "PERSON", "name": "PERSON", "patient": "PERSON", "staff": "PERSON", "doctor": "PERSON",
    "hcw": "PERSON",
    "loc": "LOCATION", "location": "LOCATION", "gpe": "LOCATION", "fac": "LOCATION", "city": "LOCATION",
    "place": "LOCATION",
}  # fmt: skip
GLINER_LABELS = ("person", "location")
BATCH = 16


def load_ner(folder: str | Path) -> Ner:
    """The model in `folder`, on the CPU. Raises WhetError when the folder holds none of the three kinds."""
    path = Path(folder)
    if not path.is_dir():
        raise WhetError("this folder does not exist", where=str(path), fix="give the folder of a model you downloaded")
    if (path / "gliner_config.json").is_file():
        return _gliner(path)
    if (path / "meta.json").is_file() and (path / "config.cfg").is_file():
        return _spacy(path)
    if (path / "config.json").is_file() and _is_token_classifier(path):
        return _transformers(path)
    raise WhetError(
        "no model for names is here: neither a transformers token classifier, nor GLiNER, nor spaCy",
        where=str(path),
        fix="give a folder with config.json (…ForTokenClassification), gliner_config.json, or meta.json and config.cfg",
    )


def entity_of(label: str) -> str | None:
    """PERSON or LOCATION for a model's own label ("B-PER", "GPE"), None for the rest."""
    bare = label.lower()
    return LABELS.get(bare[2:] if bare[1:2] in ("-", "_") else bare)


def _is_token_classifier(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return any("TokenClassification" in str(name) for name in config.get("architectures") or ())


def _transformers(path: Path) -> Ner:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model = AutoModelForTokenClassification.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise WhetError(f"the model cannot be read: {error}", where=str(path), fix="save it again") from error
    if not tokenizer.is_fast:
        fix = "save the model with its fast tokenizer (tokenizer.json)"
        raise WhetError("the tokenizer gives no character offsets", where=str(path), fix=fix)
    longest = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)) - 2, 512)
    tokenizer.model_max_length = longest
    classify: Any = pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        stride=longest // 4,
        device=-1,
    )

    def find(texts: Sequence[str]) -> list[list[Span]]:
        spans: list[list[Span]] = [[] for _ in texts]
        asked = [index for index, text in enumerate(texts) if text.strip()]
        for index, found in zip(asked, classify([texts[index] for index in asked]) if asked else (), strict=True):
            labelled = ((entity_of(str(item["entity_group"])), item) for item in found)
            spans[index] = [
                _span(texts[index], int(item["start"]), int(item["end"]), entity, float(item["score"]))
                for entity, item in labelled
                if entity is not None
            ]
        return [[span for span in some if span.start < span.end] for some in spans]

    return find


def _spacy(path: Path) -> Ner:
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise WhetError("reading this model needs spaCy", where=str(path), fix='pip install "whet[redact]"') from error
    try:
        nlp = spacy.load(path)
    except (OSError, ValueError) as error:
        raise WhetError(f"the pipeline cannot be read: {error}", where=str(path), fix="save it again") from error

    def find(texts: Sequence[str]) -> list[list[Span]]:
        spans = []
        for text, document in zip(texts, nlp.pipe(_short(texts, nlp.max_length)), strict=True):
            labelled = ((entity_of(item.label_), item) for item in document.ents)
            spans.append(
                [_span(text, item.start_char, item.end_char, entity, 0.8) for entity, item in labelled if entity]
            )
        return spans

    return find


def _short(texts: Sequence[str], longest: int) -> list[str]:
    """spaCy refuses texts over a length; the rules still read all of them."""
    return [text[:longest] for text in texts]


def _gliner(path: Path) -> Ner:
    try:
        from gliner import GLiNER  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise WhetError("reading this model needs GLiNER", where=str(path), fix="pip install gliner") from error
    previous = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # its loader asks the hub for the encoder's configuration otherwise
    try:
        model: Any = GLiNER.from_pretrained(str(path), local_files_only=True)
    finally:
        if previous is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = previous

    def find(texts: Sequence[str]) -> list[list[Span]]:
        spans = []
        for text in texts:
            found = model.predict_entities(text, list(GLINER_LABELS), threshold=0.5) if text.strip() else []
            labelled = ((entity_of(str(item["label"])), item) for item in found)
            spans.append(
                [
                    _span(text, int(item["start"]), int(item["end"]), entity, float(item["score"]))
                    for entity, item in labelled
                    if entity
                ]
            )
        return spans

    return find


def _span(text: str, start: int, end: int, entity: str, score: float) -> Span:
    """Within the text and without blanks at its ends; at most 0.8, so that check digits and forms win."""
    start, end = max(0, start), min(len(text), end)
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return Span(start, end, entity, min(score, 0.8))
