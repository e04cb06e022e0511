"""What only a tokenizer shows: rows that are cut, that its template refuses, that spell its special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from whet.data.doctor.findings import Finding, Place, by_share
from whet.data.doctor.rows import Row
from whet.data.examples import Text
from whet.data.labels import IGNORE
from whet.data.report.preview import special_ids
from whet.data.template import Tokenized, tokenize_conversation, tokenize_text
from whet.errors import WhetError

CUT = 0.01
"""Share of the rows from which cut ones are more than a note."""


def find_in_tokens(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Iterator[Finding]:
    yield from _special_tokens(rows, tokenizer)
    refused: list[Place] = []
    tokenized: list[tuple[Row, Tokenized]] = []
    for row in rows:
        try:
            tokenized.append((row, _tokenize(tokenizer, row, max_length or 2**62)))
        except WhetError as error:
            refused.append(row.place(detail=_reason(error)))
    if refused:
        yield Finding(
            "refused by the template",
            "error",
            tuple(refused),
            "Rows that the tokenizer's chat template has no place for. Training stops at them.",
            "Change or leave out these rows, or name another template (model: {template: chatml}).",
        )
    yield from _first_tokens(tokenized, tokenizer)
    if max_length is not None:
        yield from _cut(tokenized, max_length)


def _tokenize(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Tokenized:
    if isinstance(row.example, Text):
        return tokenize_text(tokenizer, row.example.text, max_length=max_length)
    tools = getattr(row.example, "tools", None)
    return tokenize_conversation(tokenizer, row.messages, max_length=max_length, tools=tools)


def _reason(error: WhetError) -> str:
    """The template's own words are the model's, not the record's, but may quote a role: one line of them is enough."""
    return error.what.splitlines()[0]


def _special_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    spelled = [token for token in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))) if token]
    if not spelled:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))))
    found = []
    for row in rows:
        for text in row.texts:
            if hit := pattern.search(text):
                found.append((row, row.place(text, hit.start(), hit.end(), detail=hit[0])))
                break
    chats = [place for row, place in found if not isinstance(row.example, Text)]
    texts = [place for row, place in found if isinstance(row.example, Text)]
    if chats:
        yield Finding(
            "special tokens",
            "error",
            tuple(chats),
            "Messages that spell special tokens of this tokenizer. They become those tokens: a record can end the "
            "model's turn, or begin one.",
            "Take them out of the texts. If the rows were rendered before, take them apart into messages.",
        )
    if texts:
        yield Finding(
            "rendered texts",
            "warning",
            tuple(texts),
            "Rows of plain text that spell special tokens of this tokenizer. All of it is learned, prompts too.",
            "If they are conversations, give them as messages, so that prompts are masked.",
        )


def _first_tokens(tokenized: Sequence[tuple[Row, Tokenized]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    doubled = [tokenizer.bos_token_id] * 2
    found = [row for row, ids in tokenized if None not in doubled and ids.input_ids[:2] == doubled]
    if found:
        yield Finding(
            "doubled first token",
            "error",
            tuple(row.place() for row in found),
            "Rows that begin with the beginning-of-sequence token twice. No server sends that.",
            "Take the token out of the texts, or out of the chat template.",
        )


def _cut(tokenized: Sequence[tuple[Row, Tokenized]], max_length: int) -> Iterator[Finding]:
    cut = [row for row, ids in tokenized if ids.truncated]
    if cut:
        yield Finding(
            "cut rows",
            by_share(len(cut), len(tokenized), warning=CUT),
            tuple(row.place() for row in cut),
            f"Rows of more than {max_length:,} tokens, cut at the end. An answer that is cut teaches not to stop.",
            "Raise max_seq_length, part the rows, or leave them out.",
        )
    barren = [row for row, ids in tokenized if all(label == IGNORE for label in ids.labels[1:])]
    if barren:
        yield Finding(
            "nothing to learn from",
            "warning",
            tuple(row.place() for row in barren),
            f"Rows without a label in their first {max_length:,} tokens. Training leaves them out.",
            "Raise max_seq_length, or shorten the prompts.",
        )
