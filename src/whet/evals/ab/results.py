"""What the votes say once the study is closed: the only place where votes and secret come together.

Ties are kept in sight: a win rate counts them as half, the counts tell them apart, and the sign test leaves them out.
An item to which both systems gave the same answer is a tie that nobody was asked about. Skipped comparisons count
nowhere but in the number of skips.

Votes on one item are not independent of each other: items, not votes, are the sample. An item's score is the mean of
its votes, a win counting 1, a tie 1/2 and a loss 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

import numpy as np

from whet.errors import WhetError
from whet.evals.ab.bradley_terry import Floats, bootstrap, log_strengths
from whet.evals.ab.study import Seat, Study
from whet.evals.ab.votes import Choice, State
from whet.evals.agreement import krippendorff_alpha
from whet.evals.statistics import Interval, mcnemar, mean, proportion

CONFIDENCE = 0.95
Winner = Literal["first", "second", "tie", "skip"]
SCORE = {"first": 0.0, "tie": 0.5, "second": 1.0}
"""Of the second system."""


@dataclass(frozen=True)
class Ballot:
    """One vote with the sides told. left, right, winner: names of systems; winner is None for a tie or a skip."""

    item: str
    grader: str
    left: str
    right: str
    choice: Choice
    winner: str | None
    comment: str
    time: str


@dataclass(frozen=True)
class Duel:
    """Two systems, counted for the second.

    items: with a vote that is not a skip, and those with identical answers. wins, ties, losses: items by the mean of
    their votes. votes: the same three of single votes. win_rate: ties as half. decided: share of wins among items
    that are not ties. p: of the sign test over items.
    """

    first: str
    second: str
    items: int
    identical: int
    unseen: int
    wins: int
    ties: int
    losses: int
    votes: tuple[int, int, int]
    skips: int
    win_rate: Interval | None
    decided: Interval | None
    p: float


@dataclass(frozen=True)
class Strength:
    """Bradley-Terry. log_odds: of being preferred to the study's first system; chance: the same as a probability."""

    system: str
    log_odds: Interval
    chance: Interval


@dataclass(frozen=True)
class Agreement:
    """Over comparisons that two graders or more voted on. agreeing: share of pairs of their votes that are alike.

    alpha: Krippendorff's, of loss, tie and win without an order; ordinal: with it, so that a tie is nearer to both.
    """

    comparisons: int
    agreeing: float | None
    alpha: Interval | None
    ordinal: Interval | None


@dataclass(frozen=True)
class Grader:
    """left: share of votes for the left side among those for a side, which shows a habit and costs no system."""

    name: str
    votes: int
    ties: int
    skips: int
    left: Interval | None


@dataclass(frozen=True)
class Results:
    study: str
    title: str
    question: str
    created: str
    closed: str
    digest: str
    commitment: str
    systems: tuple[str, ...]
    items: int
    duels: tuple[Duel, ...]
    strengths: tuple[Strength, ...]
    agreement: Agreement
    graders: tuple[Grader, ...]
    ballots: tuple[Ballot, ...]


def results(study: Study, state: State) -> Results:
    """Raises WhetError while the study is open: who looks before the end may stop when the numbers please."""
    if state.closed is None:
        raise WhetError("the study is open", where=study.title, fix="close it: whet ab close FOLDER")
    winners = _winners(study, state)
    duels = [_duel(study, winners, *pair) for pair in study.pairs]
    return Results(
        study=study.id,
        title=study.title,
        question=study.question,
        created=study.created,
        closed=state.closed,
        digest=study.digest,
        commitment=study.commitment,
        systems=study.systems,
        items=len(study.items),
        duels=tuple(duels),
        strengths=_strengths(study, winners) if len(study.systems) > 2 else (),
        agreement=_agreement(winners),
        graders=tuple(_grader(name, [vote.choice for vote in state.votes[name].values()]) for name in state.graders),
        ballots=tuple(_ballots(study, state)),
    )


Winners = dict[str, list[Winner]]
"""Key of a comparison -> what each grader's vote says."""


def _winners(study: Study, state: State) -> Winners:
    winners: Winners = {key: [] for key in study.comparisons}
    for grader in state.graders:
        for seat in study.seats(grader):
            if vote := state.votes[grader].get(seat.key):
                winners[seat.key].append(_winner(seat, vote.choice))
    return winners


def _winner(seat: Seat, choice: Choice) -> Winner:
    if choice == "left" or choice == "right":
        chosen, other = (seat.left, seat.right) if choice == "left" else (seat.right, seat.left)
        return "first" if chosen < other else "second"
    return choice


def _scores(winners: Sequence[Winner]) -> list[float]:
    """Of the second system, a vote each."""
    return [SCORE[winner] for winner in winners if winner != "skip"]


def _duel(study: Study, winners: Winners, first: int, second: int) -> Duel:
    keys = [key for key, found in study.comparisons.items() if (found.first, found.second) == (first, second)]
    voted = [winner for key in keys for winner in winners[key]]
    seen = [fmean(scores) for key in keys if (scores := _scores(winners[key]))]
    identical = study.identical(first, second)
    scores = seen + [SCORE["tie"]] * identical
    wins, losses = sum(score > 0.5 for score in seen), sum(score < 0.5 for score in seen)
    return Duel(
        first=study.systems[first],
        second=study.systems[second],
        items=len(scores),
        identical=identical,
        unseen=len(keys) - len(seen),
        wins=wins,
        ties=len(scores) - wins - losses,
        losses=losses,
        votes=(voted.count("second"), voted.count("tie"), voted.count("first")),
        skips=voted.count("skip"),
        win_rate=mean(scores, CONFIDENCE) if seen else None,
        decided=_share(wins, losses),
        p=_sign_test(wins, losses),
    )


def _share(these: int, others: int) -> Interval | None:
    return proportion(these, these + others, CONFIDENCE) if these + others else None


def _sign_test(wins: int, losses: int) -> float:
    """Two-sided, exact. McNemar's test is the sign test of the pairs that differ."""
    won = [1.0] * wins + [0.0] * losses
    return mcnemar(won, [1 - score for score in won]) if won else 1.0


def _strengths(study: Study, winners: Winners) -> tuple[Strength, ...]:
    """Each item counts once a pair, whoever many graded it."""
    systems = len(study.systems)
    wins = np.zeros((len(study.items), systems, systems))
    for i, item in enumerate(study.items):
        for first, second in study.pairs:
            scores = _scores(winners.get(f"{item.id}/{first}-{second}", ["tie"]))
            if scores:
                wins[i, second, first], wins[i, first, second] = fmean(scores), 1 - fmean(scores)
    estimate = log_strengths(wins.sum(0))
    low, high = np.quantile(bootstrap(wins), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return tuple(
        Strength(name, _interval(odds), _interval(1 / (1 + np.exp(-odds))))
        for name, odds in zip(study.systems, np.stack([estimate, low, high], 1), strict=True)
    )


def _interval(numbers: Floats) -> Interval:
    estimate, low, high = map(float, numbers)
    return Interval(estimate, low, high, CONFIDENCE)


def _agreement(winners: Winners) -> Agreement:
    order = {"first": -1, "tie": 0, "second": 1}
    units = [[order[winner] for winner in votes if winner != "skip"] for votes in winners.values()]
    shared = sum(len(unit) > 1 for unit in units)
    pairs = [a == b for unit in units for a, b in combinations(unit, 2)]
    return Agreement(
        comparisons=shared,
        agreeing=fmean(pairs) if pairs else None,
        alpha=krippendorff_alpha(units, level="nominal", confidence=CONFIDENCE),
        ordinal=krippendorff_alpha(units, level="ordinal", confidence=CONFIDENCE),
    )


def _grader(name: str, choices: Sequence[Choice]) -> Grader:
    left, right = choices.count("left"), choices.count("right")
    ties, skips = choices.count("tie"), choices.count("skip")
    return Grader(name, len(choices) - skips, ties, skips, _share(left, right))


def _ballots(study: Study, state: State) -> list[Ballot]:
    ballots = []
    for grader in state.graders:
        seats = {seat.key: seat for seat in study.seats(grader)}
        for key, vote in state.votes[grader].items():
            seat = seats[key]
            left, right = study.systems[seat.left], study.systems[seat.right]
            winner = {"left": left, "right": right}.get(vote.choice)
            ballots.append(Ballot(seat.item.id, grader, left, right, vote.choice, winner, vote.comment, vote.time))
    return ballots
