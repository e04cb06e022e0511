"""Training and evaluation sides, by a keyed hash or by time.

    side(row) = eval  if  blake2b(group, key=seed) < share * 2**64

A row's side rests on its own group and the seed alone, so rows that are added later move no old one, and all rows of a
group (a customer, a document) stay together. The same holds for a split by time, where rows from a moment on are held
out. A stratified split has the exact share in each stratum; the price is that rows at the border may move.

Arrays of N rows: hashes of groups uint64 [N], held out bool [N].
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.data.similar.duplicates import Flags, keepers
from whet.data.similar.words import Indices
from whet.errors import WhetError


def hash_of(group: Any, seed: int) -> int:
    """Uniform in [0, 2**64), of a JSON value, or the text of what is none (a date)."""
    text = json.dumps(group, sort_keys=True, separators=(",", ":"), default=str)
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8, key=str(seed).encode("ascii")).digest()
    return int.from_bytes(digest, "big")


def _threshold(fraction: float) -> int:
    if not 0 < fraction < 1:
        raise WhetError(
            f"an evaluation share of {fraction} leaves a side empty", where="split.eval", fix="use 0.1, say"
        )
    return int(fraction * 2**64)


def sides(hashes: NDArray[np.uint64], fraction: float) -> Flags:
    """Which rows are held out, by the hashes of their groups. Raises WhetError for a share that is none."""
    return hashes < np.uint64(_threshold(fraction))


def stratified_sides(
    hashes: NDArray[np.uint64], strata: NDArray[np.uint64], fraction: float, *, rows: Flags | None = None
) -> Flags:
    """Which rows are held out, so that each stratum has the share of its groups, rounded half up.

    hashes: of groups. strata: of what the share is to be met in; a group with rows in several counts in the one that
        most of its rows are in (of equals, the smallest).
    rows: those that count; the others get the side of their group.

    In each stratum the groups with the smallest hashes are held out. Added rows move the border, and with it the groups
    next to it.
    """
    _threshold(fraction)
    counted = np.ones(len(hashes), np.bool_) if rows is None else rows
    groups, group_of = np.unique(hashes, return_inverse=True)
    stratum = _stratum_of_groups(group_of[counted], strata[counted])
    members = np.unique(group_of[counted])  # in the order of their hashes
    order = members[np.argsort(stratum, kind="stable")]
    sizes = np.unique(stratum, return_counts=True)[1]
    before = np.cumsum(sizes) - sizes
    rank = np.arange(len(order)) - np.repeat(before, sizes)
    held_groups = np.zeros(len(groups), np.bool_)
    held_groups[order] = rank < np.repeat(np.floor(fraction * sizes + 0.5).astype(np.int64), sizes)
    held: Flags = held_groups[group_of]
    return held


def _stratum_of_groups(groups: Indices, strata: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The stratum that most rows of each group have, the groups in ascending order."""
    names, codes = np.unique(strata, return_inverse=True)
    pairs, counts = np.unique(groups * len(names) + codes, return_counts=True)
    owners, codes = np.divmod(pairs, max(len(names), 1))
    order = np.lexsort((codes, -counts, owners))
    first = np.unique(owners[order], return_index=True)[1]
    chosen: NDArray[np.uint64] = names[codes[order][first]]
    return chosen


def resolve_straddling(
    labels: Indices, held_out: Flags, characters: Indices, ids: NDArray[np.uint64], *, rows: Flags | None = None
) -> Flags:
    """Which rows to drop so that no cluster of near duplicates has rows on both sides, bool [N].

    Of each cluster the row that `keepers` would keep stays, and so do those on its side. No row changes side.
    rows: those that count; the others are not dropped.
    """
    counted = np.arange(len(labels)) if rows is None else np.flatnonzero(rows)
    kept = counted[keepers(labels[counted], characters[counted], ids[counted])]
    side_of = np.zeros(int(labels.max(initial=-1)) + 1, np.bool_)
    side_of[labels[kept]] = held_out[kept]
    dropped = np.zeros(len(labels), np.bool_)
    dropped[counted] = side_of[labels[counted]] != held_out[counted]
    return dropped


# ---------------------------------------------------------------- by time


def is_late(value: Any, at: Any, *, where: str | None = None) -> bool:
    """Whether a row of this moment is held out: value >= at.

    Both are a date, a date with a time, their ISO 8601 text, or a number (or its text). Without a zone: UTC. Beside a
    date, a number is the seconds since 1970, or the milliseconds from 1e11 on (in seconds, that is the year 5138).
    Raises WhetError naming `where` for anything else.
    """
    moment, border = _moment(value, where), _moment(at, "split.at")
    if isinstance(moment, datetime) != isinstance(border, datetime):
        moment, border = _in_seconds(moment), _in_seconds(border)
    return bool(moment >= border)  # type: ignore[operator]


def _moment(value: Any, where: str | None) -> datetime | float:
    if isinstance(value, str):
        value = _parsed(value.strip())
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return value
    # The value itself is not shown: it may be what redaction is to remove.
    raise WhetError(
        "a time that cannot be read" if value is not None else "no time",
        where=where,
        fix="write it as 2026-01-31, 2026-01-31T12:00:00Z or the seconds since 1970",
    )


def _parsed(text: str) -> datetime | float | str:
    """An ISO date or a number; the text itself if it is neither. Eight digits are a date if there is such a day."""
    digits = text.isdigit() and len(text) != 8
    for parse in (float,) if digits else (datetime.fromisoformat, float):
        try:
            return parse(text)
        except ValueError:
            continue
    return text


def _in_seconds(moment: datetime | float) -> float:
    if isinstance(moment, datetime):
        return moment.timestamp()
    return moment / 1000 if abs(moment) >= 1e11 else moment
