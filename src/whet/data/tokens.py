"""Examples as token ids with labels, in an Arrow file, a window of documents in memory at a time.

A file has a row for each example or, packed, for each `max_length` tokens: input_ids, labels and, packed, seq_lengths,
the lengths of the documents in the row. `read_rows` maps files into memory, so that a set may be larger than it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value, concatenate_datasets  # type: ignore[import-untyped]
from datasets import List as ListOf
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from whet.data.examples import Conversation, Example
from whet.data.faults import Faults
from whet.data.pack import pack
from whet.data.template import IGNORE, TrainOn, check_template, tokenize
from whet.errors import WhetError

WINDOW = 10_000
"""Documents that are fitted into rows together: enough to fill them."""
WINDOW_TOKENS = 1 << 23
"""And so many tokens at most, about: 64 MiB of ids and labels."""
Row = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and labels [T] of an example."""


@dataclass
class Counts:
    """rows, tokens, label_tokens: of the examples kept. truncated: of them. all_masked: examples left out.

    written: rows in the files, fewer than `rows` when they are packed.
    """

    rows: int = 0
    tokens: int = 0
    label_tokens: int = 0
    truncated: int = 0
    all_masked: int = 0
    written: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def write_tokens(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    *,
    max_length: int,
    train_on: TrainOn = "responses",
    packing: bool = False,
) -> Counts:
    """Tokenize the examples into the file `path`, in their order unless they are packed.

    Rows without a label left, as when the prompt alone fills `max_length`, are left out and counted.
    Raises WhetError, naming file and line, for preference pairs and what the template refuses.
    """
    counts, faults = Counts(), Faults()
    kept = _kept(tokenizer, examples, max_length, train_on, counts, faults)
    names = ["input_ids", "labels", "seq_lengths"] if packing else ["input_ids", "labels"]
    schema = Features({name: ListOf(Value("int32")) for name in names}).arrow_schema
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as file:
        for window in _windows(kept):
            rows = pack(_dataset(window), max_length) if packing else _dataset(window)
            file.write_table(rows.with_format("arrow")[:].select(names).cast(schema))
            counts.written += len(rows)
    faults.raise_if_any()
    return counts


def read_rows(paths: Sequence[Path]) -> Dataset:
    """The rows of several files, one after another, without reading them into memory."""
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def _kept(
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    max_length: int,
    train_on: TrainOn,
    counts: Counts,
    faults: Faults,
) -> Iterator[Row]:
    """The examples that have something to learn, while `counts` and `faults` grow."""
    for example in examples:
        if isinstance(example, Conversation):
            check_template(tokenizer)
        try:
            row = tokenize(tokenizer, example, max_length=max_length, train_on=train_on)
        except WhetError as error:
            where = f"{example.where}, {error.where}" if error.where else example.where
            faults.add(WhetError(error.what, where=where, fix=error.fix))
            continue
        learned = sum(label != IGNORE for label in row.labels)
        if learned == 0 or (learned == 1 and row.labels[0] != IGNORE):  # nothing predicts the first token
            counts.all_masked += 1
            continue
        counts.rows += 1
        counts.tokens += len(row.input_ids)
        counts.label_tokens += learned
        counts.truncated += row.truncated
        yield np.asarray(row.input_ids, dtype=np.int32), np.asarray(row.labels, dtype=np.int32)


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    window: list[Row] = []
    tokens = 0
    for row in rows:
        window.append(row)
        tokens += len(row[0])
        if len(window) == WINDOW or tokens >= WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
    if window:
        yield window


def _dataset(rows: Sequence[Row]) -> Dataset:
    columns = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    return Dataset.from_dict(columns, features=Features({name: ListOf(Value("int32")) for name in columns}))
