"""Rows as the model will see them, as a web page: what it learns from marked, the rest dimmed.

The page holds the rows' text. `template.preview` shows one row in the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from whet.data.labels import IGNORE, check_fast
from whet.data.template import Tokenized
from whet.pages import write_page

TEMPLATE = Path(__file__).with_name("preview.html.jinja")


@dataclass(frozen=True)
class Run:
    """Tokens in a row that are shown alike. special: one token of the tokenizer's own, as <|im_end|>."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class Row:
    """tokens, label_tokens: as in `template.Counts`. barren: nothing to learn from; nothing predicts a first token."""

    runs: Sequence[Run]
    tokens: int
    label_tokens: int
    truncated: bool
    barren: bool


def preview_html(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Tokenized], path: Path) -> None:
    """Write the rows to one HTML file: their text, and how many tokens, labels and cut ends each has."""
    shown = [
        Row(
            list(runs(tokenizer, row)),
            tokens=len(row.input_ids),
            label_tokens=sum(label != IGNORE for label in row.labels),
            truncated=row.truncated,
            barren=all(label == IGNORE for label in row.labels[1:]),
        )
        for row in rows
    ]
    name = Path(tokenizer.name_or_path).name
    write_page(path, TEMPLATE, title="Rows as the model sees them", rows=shown, tokenizer=name)


def runs(tokenizer: PreTrainedTokenizerBase, row: Tokenized) -> Iterator[Run]:
    """The row in runs, whose texts together are the row's text. A special token is a run of its own."""
    check_fast(tokenizer)
    special = special_ids(tokenizer)
    texts = _texts(tokenizer, row.input_ids)
    kinds = [(label != IGNORE, token in special) for token, label in zip(row.input_ids, row.labels, strict=True)]
    for (learned, is_special), items in groupby(range(len(kinds)), key=kinds.__getitem__):
        parts = [texts[i] for i in items]
        for text in parts if is_special else ["".join(parts)]:
            yield Run(text, learned, is_special)


def _texts(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> list[str]:
    """What each token adds to the text before it: decoded alone, a token of some tokenizers loses its first space.

    A character of several tokens counts to the last of them; one that the row's end cuts is shown as U+FFFD.
    """
    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in input_ids]
    whole = str(tokenizer.decode(input_ids, clean_up_tokenization_spaces=False))
    shown = "".join(texts)
    if texts and whole.startswith(shown):
        texts[-1] += whole[len(shown) :]
    return texts


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that no text of a record should give: those that the tokenizer declares special."""
    declared: Iterable[int] = (token for token, added in tokenizer.added_tokens_decoder.items() if added.special)
    return frozenset({*declared, *tokenizer.all_special_ids})
