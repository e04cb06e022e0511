"""Formatting functions of two generations, applied to a data set.

Today's gets one row and returns its text. Older ones get a batch, as a dict of lists, and return a list of texts; some
get one row and return a list that holds its one text. Which it is shows on the first row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from whet.errors import WhetError

FormattingFunction = Callable[[dict[str, Any]], str | list[str]]


def formatted(dataset: Any, function: FormattingFunction, num_proc: int | None = None) -> Any:
    """A data set with the one column "text". dataset: a Dataset or IterableDataset.

    Raises WhetError when the function returns neither text nor a list of texts.
    """
    first = next(iter(dataset))
    batched = _takes_batches(function, first)

    def texts(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        if batched:
            return {"text": list(function(batch))}
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        return {"text": [_only(function(row)) for row in rows]}

    options = {"num_proc": num_proc} if isinstance(dataset, Dataset) else {}
    return dataset.map(texts, batched=True, remove_columns=list(first), **options)


def _takes_batches(function: FormattingFunction, row: dict[str, Any]) -> bool:
    """Whether the function is one for batches: given `row` alone it returns no text, given it twice, two texts."""
    text: Any = None
    failure: Exception | None = None
    try:
        text = function(dict(row))
    except Exception as error:  # a function for batches may trip over a row in any way
        failure = error
    if isinstance(text, str):
        return False
    try:
        texts: Any = function({name: [value, value] for name, value in row.items()})
    except Exception as error:  # as may a function for rows over a batch
        texts, failure = None, failure or (error if text is None else None)
    if isinstance(texts, (list, tuple)) and len(texts) == 2 and all(isinstance(t, str) for t in texts):
        return True
    if failure is not None:
        raise failure
    _only(text)
    return False


def _only(text: str | list[str]) -> str:
    if isinstance(text, (list, tuple)) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        raise WhetError(
            f"returned {type(text).__name__}, not text",
            where="formatting_func",
            fix="return one string for a row, or a list of strings, one for each row of a batch",
        )
    return text
