"""A row's side rests on the row alone."""

from __future__ import annotations

import datetime
from datetime import UTC

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.examples import Example, Text
from whet.data.similar.duplicates import keepers
from whet.data.split import hash_of, is_late, resolve_straddling, sides, split, stratified_sides
from whet.errors import WhetError


def texts(words: list[str]) -> list[Example]:
    return [Text(text=word, source="a", line=i, extra={"customer": len(word)}) for i, word in enumerate(words)]


FIXED = texts([f"row {i}" for i in range(200)])


@settings(deadline=None)
@given(added=st.lists(st.text(min_size=1), max_size=50), seed=st.integers(0, 5), at=st.integers(0, 200))
def test_added_rows_never_move_old_ones(added: list[str], seed: int, at: int):
    train, held_out = split(FIXED, 0.2, seed=seed)
    more = FIXED[:at] + texts(added) + FIXED[at:]
    more_train, more_held_out = split(more, 0.2, seed=seed)
    assert {e.id for e in train} <= {e.id for e in more_train}
    assert {e.id for e in held_out} <= {e.id for e in more_held_out}
    assert not {e.id for e in more_train} & {e.id for e in more_held_out}
    assert len(more_train) + len(more_held_out) == len(more)


def test_the_sides_are_the_same_on_every_machine():
    """Catches a split by Python's own hash, which differs from run to run. The numbers were written down once."""
    _, held_out = split(FIXED[:40], 0.1, seed=7)
    assert [example.line for example in held_out] == [18, 19, 28, 32, 37, 38]


def test_the_share_is_about_right_and_the_seed_changes_it():
    many = texts([f"row {i}" for i in range(5000)])
    first, second = (split(many, 0.1, seed=seed)[1] for seed in (0, 1))
    assert 400 < len(first) < 600
    assert {e.id for e in first} != {e.id for e in second}


def test_a_larger_share_keeps_the_rows_of_a_smaller_one():
    small, large = (split(FIXED, fraction)[1] for fraction in (0.1, 0.3))
    assert {e.id for e in small} < {e.id for e in large}


@pytest.mark.parametrize("key", ["customer", lambda example: example.extra["customer"]])
def test_a_group_stays_together(key: object):
    examples = texts(["x" * (i % 30 + 1) + str(i) for i in range(300)])
    train, held_out = split(examples, 0.3, key=key)  # type: ignore[arg-type]
    assert not {e.extra["customer"] for e in train} & {e.extra["customer"] for e in held_out}


def test_faults_name_the_column_the_share_or_the_empty_side():
    with pytest.raises(WhetError, match="a:0: no value in the column 'patient'"):
        split(FIXED, 0.1, key="patient")
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(WhetError, match="leaves a side empty"):
            split(FIXED, fraction)
    with pytest.raises(WhetError, match="none is left for evaluation"):
        split(FIXED[:2], 1e-9)
    with pytest.raises(WhetError, match="none is left for training"):
        split(FIXED[:2], 1 - 1e-9)


def test_the_share_of_groups_is_about_right_however_large_they_are():
    """Catches a share that is taken of rows: groups of 1 to 9 rows, 2000 of them, are split 30 to 70."""
    rows = [
        Text(text=f"{group}-{i}", source="a", line=i, extra={"customer": f"c{group}"})
        for group in range(2000)
        for i in range(group % 9 + 1)
    ]
    train, held_out = split(rows, 0.3, key="customer")
    groups = {e.extra["customer"] for e in held_out}
    assert 540 < len(groups) < 660
    assert not groups & {e.extra["customer"] for e in train}
    assert [e.id for e in train] == [e.id for e in rows if e.extra["customer"] not in groups]


@pytest.mark.parametrize(
    ("values", "held_out_lines"),
    [
        ([f"customer {i}" for i in range(12)], [4, 10]),
        ([*range(12)], [0, 5]),
        ([datetime.date(2026, 1, i + 1) for i in range(12)], [0, 10]),
        ([{"b": i, "a": "é"} for i in range(12)], [1, 4, 11]),
    ],
)
def test_groups_of_every_type_fall_on_sides_written_down_once(values: list[object], held_out_lines: list[int]):
    rows = [Text(text="x", source="a", line=i, extra={"group": value}) for i, value in enumerate(values)]
    _, held_out = split(rows, 0.3, key="group", seed=3)
    assert [example.line for example in held_out] == held_out_lines


def test_equal_content_stays_together_without_a_key():
    twice = texts([f"row {i}" for i in range(200)] * 2)
    train, held_out = split(twice, 0.3)
    assert not {e.id for e in train} & {e.id for e in held_out}


@pytest.mark.parametrize("value", [None, "absent"])
def test_a_row_without_its_group_is_named(value: str | None):
    extra = {"customer": None, "date": 1} if value is None else {"date": 1}
    with pytest.raises(WhetError) as caught:
        split([*FIXED, Text(text="x", source="b.csv", line=9, extra=extra)], 0.1, key="customer")
    assert caught.value.where == "b.csv:9"
    assert "date" in (caught.value.fix or "")


# ---------------------------------------------------------------- on arrays


def hashes(groups: list[int], seed: int = 0) -> np.ndarray:
    return np.array([hash_of(group, seed) for group in groups], np.uint64)


def test_the_sides_of_arrays_are_those_of_split():
    _, held_out = split(FIXED, 0.2, key=lambda example: example.line, seed=3)
    found = sides(hashes(list(range(200)), seed=3), 0.2)
    assert np.flatnonzero(found).tolist() == [example.line for example in held_out]
    with pytest.raises(WhetError, match="leaves a side empty"):
        sides(hashes([1]), 0)


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
