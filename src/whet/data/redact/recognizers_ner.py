"""Names and places by a model in a folder: a transformers token classifier, GLiNER, or a spaCy pipeline.

Nothing is fetched, no code that came with the model runs, and weights are read from safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.data.redact import recognizers_gliner
from whet.data.redact.recognizers import Span, within
from whet.errors import WhetError

Ner = Callable[[Sequence[str]], list[list[Span]]]
"""Texts to the PERSON and LOCATION spans of each."""

LABELS = {
    "per": "PERSON", "person": "PERSON", "name": "PERSON", "patient": "PERSON", "staff": "PERSON", "doctor": "PERSON",
    "hcw": "PERSON",
    "loc": "LOCATION", "location": "LOCATION", "gpe": "LOCATION", "fac": "LOCATION", "city": "LOCATION",
    "place": "LOCATION",
}  # fmt: skip
RECOGNIZING = ("ner", "beam_ner", "entity_ruler", "span_ruler")
"""spaCy's components that set `Doc.ents`."""


@dataclass(frozen=True)
class NameModel:
    """A model as its folder's configuration describes it. entities: what its labels stand for, PERSON or LOCATION."""

    path: Path
    entities: frozenset[str]
    read: Callable[[Path], Ner]

    def load(self) -> Ner:
        """With its weights, on the CPU. Raises WhetError where they cannot be read."""
        return self.read(self.path)


def name_model(folder: str | Path) -> NameModel:
    """The model in `folder`; its weights are not read.

    Raises WhetError when the folder holds none of the three kinds, or a model for neither names nor places.
    """
    path = Path(folder)
    if not path.is_dir():
        raise WhetError("this folder does not exist", where=str(path), fix="give the folder of a model you downloaded")
    if (path / recognizers_gliner.CONFIG).is_file():
        return NameModel(path, frozenset(recognizers_gliner.LABELS.values()), recognizers_gliner.Gliner)
    if (path / "meta.json").is_file() and (path / "config.cfg").is_file():
        return NameModel(path, _entities(_spacy_labels(path), path), _spacy)
    config = _json(path / "config.json")
    if any("TokenClassification" in str(name) for name in config.get("architectures") or ()):
        return NameModel(path, _entities((config.get("id2label") or {}).values(), path), _transformers)
    raise WhetError(
        "no model for names is here: neither a transformers token classifier, nor GLiNER, nor spaCy",
        where=str(path),
        fix="give a folder with config.json (…ForTokenClassification), gliner_config.json, or meta.json and config.cfg",
    )


def entity_of(label: str) -> str | None:
    """PERSON or LOCATION for a model's own label ("B-PER", "GPE"), None for the rest."""
    bare = label.lower()
    return LABELS.get(bare[2:] if bare[1:2] in ("-", "_") else bare)


def _entities(labels: Iterable[Any], path: Path) -> frozenset[str]:
    labels = sorted(map(str, labels))
    found = frozenset(entity for label in labels if (entity := entity_of(label)))
    if not found:
        shown = ", ".join(labels[:10]) or "none"
        fix = "give another model, or name its labels in its configuration: B-PER, I-PER, B-LOC, I-LOC"
        raise WhetError(f"the model's labels say neither people nor places: {shown}", where=str(path), fix=fix)
    return found


def _json(path: Path) -> dict[str, Any]:
    """Of a file that may be missing or no JSON object: an empty one then."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return value if isinstance(value, dict) else {}


def _spacy_labels(path: Path) -> list[str]:
    """Those of the components that recognise entities; config.cfg says of each component what it is."""
    config = ConfigParser(interpolation=None, strict=False)
    try:
        config.read_string((path / "config.cfg").read_text(encoding="utf-8"))
    except (ConfigParserError, ValueError, OSError):
        return []
    labels = _json(path / "meta.json").get("labels") or {}
    return [
        str(label)
        for component, names in labels.items()
        if config.get(f"components.{component}", "factory", fallback="").strip('"') in RECOGNIZING
        for label in names
    ]


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
                within(texts[index], int(item["start"]), int(item["end"]), entity, float(item["score"]))
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
                [within(text, item.start_char, item.end_char, entity, 0.8) for entity, item in labelled if entity]
            )
        return spans

    return find


def _short(texts: Sequence[str], longest: int) -> list[str]:
    """spaCy refuses texts over a length; the rules still read all of them."""
    return [text[:longest] for text in texts]
