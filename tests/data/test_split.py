"""A row's side rests on the row alone."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.examples import Example, Text
from whet.data.split import split
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
