"""Names and places by a GLiNER model in a folder.

GLiNER (Zaratiana et al. 2023, arXiv:2311.08526) is asked for classes by their names. Its package reads at most
`max_len` words and drops the rest, so longer texts are read in windows that overlap. It would fetch what a folder
lacks, and lets encoders run code of their own; such folders are refused before it sees them.

The newest package that can be installed beside whet's transformers is 0.2.24: later ones ask for an older one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from whet.data.redact.recognizers import Span, within
from whet.errors import WhetError

CONFIG = "gliner_config.json"
LABELS = {"person": "PERSON", "location": "LOCATION"}
"""What the model is asked for, and the class of each."""
PACKAGE = "gliner<=0.2.24"
THRESHOLD = 0.5
BATCH = 16
PROMPT = 16  # tokens for the labels and the marks beside them


class Window(NamedTuple):
    """Characters `start` to `end` of text number `text`."""

    text: int
    start: int
    end: int


class Gliner:
    """Texts to their spans. Raises WhetError for a folder that is not complete, or cannot be read."""

    def __init__(self, path: Path) -> None:
        _check(path)
        try:
            from gliner import GLiNER  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            fix = f'pip install "{PACKAGE}", or give a transformers or spaCy folder'
            raise WhetError("reading this model needs GLiNER", where=str(path), fix=fix) from error
        try:
            self._model: Any = GLiNER.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise WhetError(f"the model cannot be read: {error}", where=str(path), fix="save it again") from error
        self._tokenizer: Any = self._model.data_processor.transformer_tokenizer
        config = self._model.config
        positions = getattr(config.encoder_config, "max_position_embeddings", None) or 512
        self._words = int(config.max_len)
        self._tokens = min(int(self._tokenizer.model_max_length), int(positions), 512) - PROMPT

    def __call__(self, texts: Sequence[str]) -> list[list[Span]]:
        spans: list[list[Span]] = [[] for _ in texts]
        windows = [window for number, text in enumerate(texts) for window in self._windows(number, text)]
        if not windows:
            return spans
        parts = [texts[number][start:end] for number, start, end in windows]
        found = self._model.inference(parts, list(LABELS), threshold=THRESHOLD, batch_size=BATCH)
        for (number, first, _), items in zip(windows, found, strict=True):
            for item in items:
                start, end = first + int(item["start"]), first + int(item["end"])
                spans[number].append(within(texts[number], start, end, LABELS[item["label"]], float(item["score"])))
        return spans

    def _windows(self, number: int, text: str) -> Iterator[Window]:
        """As many words as the model reads at a time, a quarter of them again in the next window."""
        words = list(self._model.data_processor.words_splitter(text))
        if not words:
            return
        pieces = self._tokenizer([word for word, _, _ in words], add_special_tokens=False)["input_ids"]
        before = [0, *accumulate(map(len, pieces))]
        first = 0
        while True:
            last = first + 1  # one past; a word that is too long has a window of its own
            while last < len(words) and last - first < self._words and before[last + 1] - before[first] <= self._tokens:
                last += 1
            yield Window(number, words[first][1], words[last - 1][2])
            if last == len(words):
                return
            first = max(first + 1, last - (last - first) // 4)


def _check(path: Path) -> None:
    """Raises WhetError for what the package would fetch, run, or unpickle."""
    try:
        config = dict(json.loads((path / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise WhetError("the configuration is no JSON object", where=str(path / CONFIG), fix="save it again") from error
    encoder = config.get("encoder_config")
    fix = "save it with its package: GLiNER.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
    if not isinstance(encoder, dict) or not (path / "tokenizer_config.json").is_file():
        raise WhetError(
            "the configuration of the encoder or the tokenizer is not in this folder", where=str(path), fix=fix
        )
    if not (path / "model.safetensors").is_file():
        raise WhetError("model.safetensors is not in this folder", where=str(path), fix=fix)
    others = [name for name in ("labels_encoder", "labels_decoder") if config.get(name)]
    if others or "auto_map" in encoder or config.get("words_splitter_type", "whitespace") != "whitespace":
        why = (
            others[0] if others else "code of its own" if "auto_map" in encoder else "another splitter than whitespace"
        )
        fix = "give a GLiNER of one encoder, or a transformers or spaCy folder"
        raise WhetError(f"this model needs {why}, which whet does not read", where=str(path), fix=fix)
