"""What votes add up to, from graders whose taste the test knows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evals.ab.studies import KIND, PLAIN, SYSTEMS, make_study, side, vote
from whet.errors import WhetError
from whet.evals.ab.answers import System, read_systems
from whet.evals.ab.export import as_csv, as_json, as_text
from whet.evals.ab.results import Results, results
from whet.evals.ab.study import Seat, create, load
from whet.evals.ab.votes import Choice, Closed, Log, now, read
from whet.evals.statistics import proportion

Taste = Callable[[Seat], Choice | None]


def likes(opening: str) -> Taste:
    return lambda seat: side(seat, opening)


def tally(folder: Path, **tastes: Taste) -> Results:
    study = load(folder / "study")
    with Log(folder / "study" / "votes.jsonl", study) as log:
        for grader, taste in tastes.items():
            for seat in study.seats(grader):
                if (choice := taste(seat)) is not None:
                    vote(log, grader, seat, choice)
        log.append(Closed(time=now()))
    return results(study, read(folder / "study" / "votes.jsonl", study))


@pytest.mark.parametrize(("opening", "wins", "losses"), [(KIND, 20, 0), (PLAIN, 0, 20)])
def test_a_taste_for_one_system_is_found_wherever_it_stood(
    tmp_path: Path, opening: str, wins: int, losses: int
) -> None:
    """Catches sides mixed up between the page and the count: wins would go to the other system."""
    make_study(tmp_path, 20)
    found = tally(tmp_path, ada=likes(opening), grace=likes(opening))
    (duel,) = found.duels
    assert (duel.first, duel.second) == SYSTEMS
    assert (duel.wins, duel.ties, duel.losses) == (wins, 0, losses)
    assert duel.votes == (2 * wins, 0, 2 * losses)
    assert duel.p == pytest.approx(2 / 2**20)
    assert {ballot.winner for ballot in found.ballots} == {SYSTEMS[1] if wins else SYSTEMS[0]}
    assert found.agreement.alpha is None, "all votes are alike: chance would agree as well"
    assert found.agreement.agreeing == 1


def test_a_habit_for_one_side_favours_no_system(tmp_path: Path) -> None:
    make_study(tmp_path, 20, ("ada",))
    found = tally(tmp_path, ada=lambda seat: "left")
    (duel,) = found.duels
    assert duel.win_rate is not None
    assert duel.win_rate.estimate == 0.5
    (grader,) = found.graders
    assert grader.left is not None
    assert grader.left.estimate == 1, "and the habit itself is shown"


def test_more_graders_who_say_the_same_do_not_narrow_the_interval(tmp_path: Path) -> None:
    """Catches votes counted as independent: graders see the same items, and three who copy each other know no more."""

    def taste(seat: Seat) -> Choice:
        return side(seat, KIND if _number(seat) % 3 else PLAIN)

    intervals = []
    for graders in (("ada",), ("ada", "grace", "lin")):
        folder = tmp_path / str(len(graders))
        folder.mkdir()
        make_study(folder, 30, graders)
        intervals.append(tally(folder, **dict.fromkeys(graders, taste)).duels[0].win_rate)
    assert intervals[0] == intervals[1] == proportion(20, 30)


def test_ties_count_half_and_are_told_apart(tmp_path: Path) -> None:
    make_study(tmp_path, 10)
    odd = likes(KIND)
    found = tally(tmp_path, ada=likes(KIND), grace=lambda seat: "tie" if _number(seat) < 5 else odd(seat))
    (duel,) = found.duels
    assert duel.win_rate is not None
    assert duel.win_rate.estimate == pytest.approx((5 * 0.75 + 5 * 1) / 10)
    assert (duel.wins, duel.ties, duel.losses) == (10, 0, 0), "a win and a tie lean to the win"
    assert duel.votes == (15, 5, 0)


def test_graders_who_contradict_each_other_make_ties(tmp_path: Path) -> None:
    make_study(tmp_path, 10)
    found = tally(tmp_path, ada=likes(KIND), grace=likes(PLAIN))
    (duel,) = found.duels
    assert (duel.wins, duel.ties, duel.losses) == (0, 10, 0)
    assert duel.p == 1
    assert duel.decided is None
    assert found.agreement.agreeing == 0
    assert found.agreement.alpha is not None
    assert found.agreement.alpha.estimate < 0


def test_skips_and_gaps_are_not_votes(tmp_path: Path) -> None:
    """Catches a skip counted as a tie, and an item nobody voted on counted at all."""
    make_study(tmp_path, 10, ("ada",))
    kind = likes(KIND)
    found = tally(tmp_path, ada=lambda seat: "skip" if _number(seat) < 3 else None if _number(seat) < 5 else kind(seat))
    (duel,) = found.duels
    assert (duel.items, duel.unseen, duel.skips) == (5, 5, 3)
    assert duel.win_rate is not None
    assert duel.win_rate.estimate == 1
    assert found.agreement.agreeing is None


def test_the_same_answers_are_ties_that_nobody_was_asked_about(tmp_path: Path) -> None:
    """Catches a win rate over differing answers alone, which makes a rare difference look like a large one."""
    a, b = tmp_path / "narwhal.jsonl", tmp_path / "ocelot.jsonl"
    for path, opening in ((a, PLAIN), (b, KIND)):
        answers = [opening if i < 2 else "same" for i in range(10)]
        lines = [{"id": i, "prompt": "p", "answer": answer} for i, answer in enumerate(answers)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = create(tmp_path / "study", [*read_systems(a), *read_systems(b)])
    with Log(tmp_path / "study" / "votes.jsonl", study, new=True) as log:
        log.add_link("grader", "ada")
    found = tally(tmp_path, ada=likes(KIND))
    (duel,) = found.duels
    assert (duel.items, duel.identical, duel.wins, duel.ties) == (10, 8, 2, 8)
    assert duel.win_rate is not None
    assert duel.win_rate.estimate == pytest.approx(0.6)


def test_three_systems_are_put_in_one_order(tmp_path: Path) -> None:
    texts = ("bad", "good", "better")
    systems = []
    for text in texts:
        path = tmp_path / f"{text}.jsonl"
        lines = [{"id": i, "prompt": "p", "answer": f"{text} {i}"} for i in range(12)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        systems += read_systems(path)
    study = create(tmp_path / "study", systems)
    with Log(tmp_path / "study" / "votes.jsonl", study, new=True) as log:
        log.add_link("grader", "ada")

    def taste(seat: Seat) -> Choice:
        if _number(seat) % 4 == 0:
            return "tie"
        return "left" if seat.left > seat.right else "right"

    found = tally(tmp_path, ada=taste)
    assert [strength.system for strength in found.strengths] == list(texts)
    odds = [strength.log_odds.estimate for strength in found.strengths]
    assert odds[0] == 0
    assert odds == sorted(odds)
    for strength in found.strengths:
        assert strength.chance.low <= strength.chance.estimate <= strength.chance.high
    assert len(found.duels) == 3
    assert all((duel.wins, duel.ties, duel.losses) == (9, 3, 0) for duel in found.duels)


def test_an_open_study_tells_nothing(tmp_path: Path) -> None:
    make_study(tmp_path)
    study = load(tmp_path / "study")
    with pytest.raises(WhetError, match="the study is open"):
        results(study, read(tmp_path / "study" / "votes.jsonl", study))


def test_a_study_without_votes_has_results(tmp_path: Path) -> None:
    """Catches a division by no votes."""
    make_study(tmp_path)
    found = tally(tmp_path)
    assert found.duels[0].win_rate is None
    assert json.loads(as_json(found))["duels"][0]["items"] == 0
    assert "n/a" in as_text(found)


def test_exports_hold_every_vote(tmp_path: Path) -> None:
    """Catches a comment that a spreadsheet runs as a formula, and one that breaks the CSV's rows."""
    make_study(tmp_path, 6, ("ada",))
    study = load(tmp_path / "study")
    comments = ["=HYPERLINK(1)", 'quotes " and, commas', "two\nlines", "ünïcode", "", "-1"]
    with Log(tmp_path / "study" / "votes.jsonl", study) as log:
        for seat, comment in zip(study.seats("ada"), comments, strict=True):
            vote(log, "ada", seat, side(seat, KIND), comment)
        log.append(Closed(time=now()))
        found = results(study, log.state)
    rows = list(csv.DictReader(io.StringIO(as_csv(found), newline="")))
    assert [row["comment"] for row in rows] == ["'=HYPERLINK(1)", *comments[1:5], "'-1"]
    assert {row["winner"] for row in rows} == {SYSTEMS[1]}
    saved = json.loads(as_json(found))
    assert [ballot["comment"] for ballot in saved["ballots"]] == comments
    assert saved["commitment"] == study.commitment
    assert "win rate       100.0%" in as_text(found)


def _number(seat: Seat) -> int:
    return int(seat.item.id.split("-")[-1])


def test_a_system_is_what_its_file_says(tmp_path: Path) -> None:
    """Catches names given to the wrong file when results are read by name."""
    a, b = (tmp_path / f"{name}.jsonl" for name in "ab")
    a.write_text('{"id": "1", "prompt": "p", "answer": "from a"}\n')
    b.write_text('{"id": "1", "prompt": "p", "answer": "from b"}\n')
    systems: list[System] = [*read_systems(b, "second"), *read_systems(a, "first")]
    study = create(tmp_path / "study", systems)
    assert study.systems == ("second", "first")
    assert study.items[0].answers == ("from b", "from a")
