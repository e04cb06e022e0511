"""Training and evaluation sides, by a keyed hash.

    side(example) = eval  if  blake2b(group, key=seed) < eval_fraction * 2**64

A row's side rests on its own group and the seed alone, so rows that are added later move no old one, and all rows of a
group (a customer, a document) stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

from whet.data.examples import Example
from whet.errors import WhetError

Key = Callable[[Example], Any]


def split(
    examples: Iterable[Example], eval_fraction: float, *, key: str | Key | None = None, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(training examples, evaluation examples), each in the order given.

    eval_fraction: between 0 and 1, of groups; the share of rows differs where groups differ in size.
    key: what groups examples: a column's name, a function of the example giving a JSON value, or None: the example's
        id, so that equal content stays together.
    Raises WhetError when the fraction is out of range, an example lacks the column, or a side is empty.
    """
    if not 0 < eval_fraction < 1:
        raise WhetError(
            f"an evaluation share of {eval_fraction} leaves a side empty", where="split.eval", fix="use 0.1, say"
        )
    group_of = _key_function(key)
    threshold = int(eval_fraction * 2**64)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[_hash(group_of(example), seed) < threshold].append(example)
    for side, name in zip(sides, ("training", "evaluation"), strict=True):
        if not side:
            raise WhetError(
                f"all {sum(map(len, sides))} examples fall on one side: none is left for {name}",
                where="split",
                fix="add rows, change split.eval, group by a finer column, or try another seed",
            )
    return sides


def _key_function(key: str | Key | None) -> Key:
    if key is None:
        return lambda example: example.id
    if callable(key):
        return key

    def column(example: Example) -> Any:
        if example.extra.get(key) is None:
            raise WhetError(
                f"no value in the column {key!r}, which groups the split",
                where=example.where,
                fix=f"fill it in, or group by another column: {', '.join(map(str, example.extra)) or 'none left'}",
            )
        return example.extra[key]

    return column


def _hash(group: Any, seed: int) -> int:
    """Uniform in [0, 2**64)."""
    text = json.dumps(group, sort_keys=True, separators=(",", ":"), default=str)
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8, key=str(seed).encode("ascii")).digest()
    return int.from_bytes(digest, "big")
