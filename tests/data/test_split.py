"""A row's side rests on the row alone."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from datetime import UTC

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.examples import Text
from whet.data.similar.duplicates import keepers
from whet.data.split import hash_of, is_late, resolve_straddling, sides, stratified_sides
from whet.errors import WhetError


def hashes(groups: Sequence[object], seed: int = 0) -> np.ndarray:
    return np.array([hash_of(group, seed) for group in groups], np.uint64)


def held_out(groups: Sequence[object], fraction: float, seed: int = 0) -> list[int]:
    """Numbers of the rows."""
    return np.flatnonzero(sides(hashes(groups, seed), fraction)).tolist()


FIXED = [f"row {i}" for i in range(200)]


@settings(deadline=None)
@given(added=st.lists(st.text(min_size=1), max_size=50), seed=st.integers(0, 5), at=st.integers(0, 200))
def test_added_rows_never_move_old_ones(added: list[str], seed: int, at: int):
    more = FIXED[:at] + added + FIXED[at:]
    before = {FIXED[i] for i in held_out(FIXED, 0.2, seed)}
    after = {more[i] for i in held_out(more, 0.2, seed)}
    assert after & set(FIXED) == before


def test_the_sides_are_the_same_on_every_machine():
    """Catches a split by Python's own hash, which differs from run to run. The numbers were written down once."""
    ids = [Text(text=f"row {i}", source="a", line=i).id for i in range(40)]
    assert held_out(ids, 0.1, seed=7) == [18, 19, 28, 32, 37, 38]


def test_the_share_is_about_right_and_the_seed_changes_it():
    first, second = (held_out([f"row {i}" for i in range(5000)], 0.1, seed) for seed in (0, 1))
    assert 400 < len(first) < 600
    assert first != second


def test_a_larger_share_keeps_the_rows_of_a_smaller_one():
    small, large = (set(held_out(FIXED, fraction)) for fraction in (0.1, 0.3))
    assert small < large


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(fraction: float):
    one = hashes([1])
    for split in (lambda: sides(one, fraction), lambda: stratified_sides(one, one, fraction)):
        with pytest.raises(WhetError, match="leaves a side empty"):
            split()


def test_the_share_of_groups_is_about_right_however_large_they_are():
    """Catches a share that is taken of rows: groups of 1 to 9 rows, 2000 of them, are split 30 to 70."""
    rows = [f"c{group}" for group in range(2000) for _ in range(group % 9 + 1)]
    groups = {rows[i] for i in held_out(rows, 0.3)}
    assert 540 < len(groups) < 660
    assert held_out(rows, 0.3) == [i for i, group in enumerate(rows) if group in groups]


@pytest.mark.parametrize(
    ("groups", "held_out_rows"),
    [
        ([f"customer {i}" for i in range(12)], [4, 10]),
        ([*range(12)], [0, 5]),
        ([datetime.date(2026, 1, i + 1) for i in range(12)], [0, 10]),
        ([{"b": i, "a": "é"} for i in range(12)], [1, 4, 11]),
    ],
)
def test_groups_of_every_type_fall_on_sides_written_down_once(groups: list[object], held_out_rows: list[int]):
    assert held_out(groups, 0.3, seed=3) == held_out_rows


ROWS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3)), max_size=60)


@settings(deadline=None)
@given(rows=ROWS, fraction=st.sampled_from([0.1, 0.25, 0.5]), order=st.randoms(use_true_random=False))
def test_strata_have_the_exact_share_of_groups_in_any_order(
    rows: list[tuple[int, int]], fraction: float, order: object
):
    """A group's stratum is its number modulo 4 here, whatever the rows say, so that no group lies in two."""
    groups = [group for group, _ in rows]
    strata = np.array([group % 4 for group in groups], np.uint64)
    held = stratified_sides(hashes(groups), strata, fraction)
    for stratum in range(4):
        members = {group for group in groups if group % 4 == stratum}
        held_groups = {group for group, out in zip(groups, held, strict=True) if out and group % 4 == stratum}
        assert len(held_groups) == int(fraction * len(members) + 0.5)
    moved = list(range(len(rows)))
    order.shuffle(moved)
    again = stratified_sides(hashes([groups[i] for i in moved]), strata[moved], fraction)
    assert again.tolist() == held[moved].tolist()


@settings(deadline=None)
@given(rows=ROWS, counted=st.lists(st.booleans(), min_size=60, max_size=60))
def test_a_group_in_several_strata_stays_together(rows: list[tuple[int, int]], counted: list[bool]):
    groups = [group for group, _ in rows]
    strata = np.array([stratum for _, stratum in rows], np.uint64)
    held = stratified_sides(hashes(groups), strata, 0.3, rows=np.array(counted[: len(rows)], np.bool_))
    for group in set(groups):
        assert len({out for other, out in zip(groups, held, strict=True) if other == group}) == 1


def test_a_group_counts_where_most_of_its_rows_are():
    """Five groups in each stratum, of which three are held out; six and four would make it five in all."""
    groups = [1, 1, 1, *range(2, 11)]
    strata = np.array([0, 5, 5, *[5] * 4, *[0] * 5], np.uint64)
    held = stratified_sides(hashes(groups), strata, 0.5)
    assert len({group for group, out in zip(groups, held, strict=True) if out}) == 6


def test_rows_that_do_not_count_do_not_move_the_border():
    """Catches a share that counts duplicates which are left out."""
    groups = list(range(100))
    kept = np.arange(100) < 50
    held = stratified_sides(hashes(groups), np.zeros(100, np.uint64), 0.1, rows=kept)
    assert held[kept].sum() == 5


CLUSTERED = st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.integers(1, 5), st.booleans()), max_size=40)


@settings(deadline=None)
@given(rows=CLUSTERED)
def test_clusters_never_straddle_and_no_row_changes_side(rows: list[tuple[int, bool, int, bool]]):
    labels = np.array([row[0] for row in rows], np.int64)
    held = np.array([row[1] for row in rows], np.bool_)
    characters = np.array([row[2] for row in rows], np.int64)
    counted = np.array([row[3] for row in rows], np.bool_)
    ids = np.arange(len(rows), dtype=np.uint64).reshape(-1, 1)
    dropped = resolve_straddling(labels, held, characters, ids, rows=counted)
    assert not (dropped & ~counted).any()
    left = counted & ~dropped
    for label in set(labels[counted].tolist()):
        members = left & (labels == label)
        assert len(set(held[members].tolist())) == 1
        every = np.flatnonzero(counted & (labels == label))
        best = every[keepers(labels[every], characters[every], ids[every])]
        assert members[best].all()
        assert not dropped[every][held[every] == held[best]].any()


# ---------------------------------------------------------------- by time


@pytest.mark.parametrize(
    ("value", "at", "late"),
    [
        ("2026-01-31", "2026-02-01", False),
        ("2026-02-01", "2026-02-01", True),
        ("2026-01-31T23:59:59.5Z", "2026-02-01", False),
        ("2026-02-01T00:30:00+01:00", "2026-02-01", False),
        ("2026-01-31 23:30:00-01:00", "2026-02-01", True),
        ("20260201", "2026-02-01", True),
        (datetime.date(2026, 2, 1), "2026-02-01", True),
        (datetime.datetime(2026, 1, 31, 23, 59), datetime.date(2026, 2, 1), False),
        (datetime.datetime(2026, 2, 1, tzinfo=UTC), "2026-02-01", True),
        (1769903999, "2026-02-01", False),
        (1769904000, "2026-02-01", True),
        ("1769904000", "2026-02-01", True),
        (1769903999999, "2026-02-01", False),
        (1769904000000, "2026-02-01", True),
        ("1769904000000", "2026-02-01", True),
        ("2026-02-01", 1769904000, True),
        (7, 8, False),
        ("8", "8", True),
        (8.5, "8", True),
    ],
)
def test_a_row_is_late_from_the_moment_on(value: object, at: object, late: bool):
    assert is_late(value, at) is late


@settings(deadline=None)
@given(
    value=st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1)),
    at=st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1)),
)
def test_every_way_to_write_a_moment_says_the_same(value: datetime.datetime, at: datetime.datetime):
    value, at = (moment.replace(microsecond=0, tzinfo=UTC) for moment in (value, at))
    for written in (value, value.isoformat(), value.timestamp(), int(value.timestamp() * 1000)):
        if isinstance(written, int) and written < 1e11:
            continue  # before March 1973, milliseconds look like seconds
        for border in (at, at.isoformat(), at.strftime("%Y-%m-%dT%H:%M:%SZ")):
            assert is_late(written, border) == (value >= at)


@pytest.mark.parametrize("value", [None, "", "yesterday", "2026-13-01", True, float("nan"), [1], "nan", 10**400])
def test_a_time_that_cannot_be_read_names_the_row_and_shows_nothing_of_it(value: object):
    with pytest.raises(WhetError) as caught:
        is_late(value, "2026-01-01", where="a.csv:7")
    assert caught.value.where == "a.csv:7"
    assert not value or str(value) not in caught.value.what
    with pytest.raises(WhetError, match=r"split\.at"):
        is_late("2026-01-01", value)
