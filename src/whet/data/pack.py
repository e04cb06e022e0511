"""Packs short documents into full rows: best-fit decreasing, no document cut, boundaries kept in `seq_lengths`.

Longest first, each document goes to the row with the least space that still holds it (Ding et al. 2024,
arXiv:2404.10830). TRL does the fitting; documents of equal length keep their order, so the result is the same on every
machine. TRL's `DataCollatorForLanguageModeling(padding_free=True)` makes position ids and cu_seqlens of `seq_lengths`.
"""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]

from whet.errors import WhetError


def pack(dataset: Any, max_length: int) -> Any:
    """A data set with input_ids and labels [T <= max_length], and seq_lengths, the lengths of the documents in a row.

    dataset: a datasets.Dataset with input_ids and labels, all of it fitted together.
    Raises WhetError when it is empty or a row is too long.
    """
    from trl.data_utils import pack_dataset

    if not len(dataset):
        raise WhetError("there are no rows to pack", where="data", fix="check the sources and the split")
    dataset = dataset.select_columns(["input_ids", "labels"])
    longest = pc.max(pc.list_value_length(dataset.with_format("arrow")[:]["input_ids"])).as_py()
    if longest > max_length:
        raise WhetError(
            f"a row of {longest} tokens does not fit into {max_length}",
            where="max_length",
            fix=f"raise it to {longest}, or cut rows when they are tokenized",
        )
    return pack_dataset(dataset, max_length, strategy="bfd", map_kwargs={"batch_size": len(dataset)})
