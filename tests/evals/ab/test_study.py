"""Order and sides: by lot, balanced, each grader's own, and bound to one secret."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evals.ab.studies import SYSTEMS, make_study, write_answers
from whet.errors import WhetError
from whet.evals.ab.answers import Item, System, read_systems
from whet.evals.ab.study import Study, create, load

GRADERS = [f"grader {i}" for i in range(40)]


def a_study(items: int, systems: int = 2, secret: bytes = bytes(32)) -> Study:
    found = tuple(Item(str(i), "p", None, tuple(f"{s} {i}" for s in range(systems))) for i in range(items))
    return Study("id", "2026-01-01", "t", "q", False, tuple(f"system {s}" for s in range(systems)), found, secret)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(2, 4), st.binary(min_size=32, max_size=32), st.text(max_size=8))
def test_everybody_sees_everything_once_and_half_of_it_swapped(
    items: int, systems: int, secret: bytes, grader: str
) -> None:
    """Catches a grader's habit for one side that favours a system, and comparisons that are lost or doubled."""
    study = a_study(items, systems, secret)
    seats = study.seats(grader)
    assert sorted(seat.key for seat in seats) == sorted(study.comparisons)
    for first, second in study.pairs:
        sides = [seat.left for seat in seats if {seat.left, seat.right} == {first, second}]
        assert len(sides) == items
        assert abs(sides.count(first) - sides.count(second)) <= 1


def test_sides_and_order_are_each_graders_own() -> None:
    """Catches sides drawn once for an item: what one grader finds out would hold for all."""
    study = a_study(20)
    seats = {name: study.seats(name) for name in GRADERS}
    assert len({tuple(seat.key for seat in found) for found in seats.values()}) == len(GRADERS)
    for key in study.comparisons:
        swapped = sum(seat.left for found in seats.values() for seat in found if seat.key == key)
        assert 8 <= swapped <= 32, "by lot, 40 graders see an item swapped 8 to 32 times in all but one of 10,000 cases"


def test_an_odd_comparison_goes_either_way() -> None:
    """Catches the odd one always given to the same half: with one item the side would be known."""
    study = a_study(1)
    assert {study.seats(name)[0].left for name in GRADERS} == {0, 1}


def test_sides_do_not_follow_the_order() -> None:
    """Catches one lot used for both: the first half of what a grader sees would be swapped."""
    study = a_study(40)
    first_halves = [sum(seat.left for seat in study.seats(name)[:20]) for name in GRADERS]
    assert all(5 <= swapped <= 15 for swapped in first_halves)


def test_sides_rest_on_the_secret() -> None:
    """Catches sides that anybody could work out from what the page shows."""
    a, b = a_study(20), a_study(20, secret=bytes([1] * 32))
    assert [seat.left for seat in a.seats("ada")] != [seat.left for seat in b.seats("ada")]
    assert a.seats("ada") == a_study(20).seats("ada")


def test_the_same_answer_twice_is_not_asked() -> None:
    study = a_study(3)
    same = replace(study, items=(Item("same", "p", None, ("a", "a")), *study.items))
    assert len(same.comparisons) == 3
    assert same.identical(0, 1) == 1


def test_a_study_comes_back_as_it_was_made(tmp_path: Path) -> None:
    systems = [system for path in write_answers(tmp_path) for system in read_systems(path)]
    made = create(tmp_path / "study", systems, title="T", question="Q?", show_reference=True)
    assert load(tmp_path / "study") == made
    assert load(tmp_path / "study").digest == made.digest


def test_others_on_the_machine_cannot_read_it(tmp_path: Path) -> None:
    make_study(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "study").iterdir()}
    assert modes == {"secret.key": 0o600, "study.json": 0o600, "votes.jsonl": 0o600}


def test_a_sample_is_drawn_and_kept_in_order(tmp_path: Path) -> None:
    systems = [system for path in write_answers(tmp_path, 9) for system in read_systems(path)]
    items = create(tmp_path / "study", systems, sample=4).items
    numbers = [int(item.id.split("-")[1]) for item in items]
    assert len(numbers) == 4
    assert numbers == sorted(numbers)
    with pytest.raises(WhetError, match="cannot take 10 of 9"):
        create(tmp_path / "other", systems, sample=10)


def test_a_study_is_not_written_over(tmp_path: Path) -> None:
    """Catches a second `new` that exchanges the secret under votes that are there."""
    make_study(tmp_path)
    systems = [system for path in write_answers(tmp_path) for system in read_systems(path)]
    before = {path: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    with pytest.raises(WhetError, match="a study is here already"):
        create(tmp_path / "study", systems)
    assert {path: path.read_bytes() for path in (tmp_path / "study").iterdir()} == before


def test_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    a, _ = write_answers(tmp_path)
    (same,) = read_systems(a)
    with pytest.raises(WhetError, match="all answers are the same"):
        create(tmp_path / "study", [same, System("other", "b", same.answers)])


def test_another_secret_is_refused(tmp_path: Path) -> None:
    """Catches sides exchanged after the votes: with another secret every vote would mean something else."""
    make_study(tmp_path)
    (tmp_path / "study" / "secret.key").write_text("00" * 32)
    with pytest.raises(WhetError, match="the secret is not the one"):
        load(tmp_path / "study")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"items"', '"things"'),
        lambda text: json.dumps(json.loads(text) | {"systems": [*SYSTEMS, "third"]}),
        lambda text: json.dumps(json.loads(text) | {"title": 3}),
    ],
)
def test_a_damaged_study_is_refused(tmp_path: Path, damage: object) -> None:
    make_study(tmp_path)
    path = tmp_path / "study" / "study.json"
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(WhetError, match="cannot be read"):
        load(tmp_path / "study")


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WhetError, match="no study in this folder"):
        load(tmp_path)
