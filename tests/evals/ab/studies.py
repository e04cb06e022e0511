"""Studies that tests share: how an answer begins tells a test, and no grader, which system it is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from whet.evals.ab.answers import read_systems
from whet.evals.ab.study import Seat, create
from whet.evals.ab.votes import Choice, Log, State, Vote, now

WORDS = ("zebra", "quince", "marble", "lantern", "harbour", "saffron", "velvet", "tundra", "pebble", "orchid")
SYSTEMS = ("narwhal", "ocelot")
"""Names that are nowhere in a page, so that one that is has leaked."""

PLAIN, KIND = "Here is the reply.", "Gladly! Here is the reply."
"""How the first and the second system's answers begin."""


def write_answers(folder: Path, items: int = 6) -> tuple[Path, Path]:
    """A file of each system, with ids that no page may show."""
    paths = (folder / f"{SYSTEMS[0]}.jsonl", folder / f"{SYSTEMS[1]}.jsonl")
    for path, opening in zip(paths, (PLAIN, KIND), strict=True):
        lines = [
            {"id": f"{WORDS[i % 10]}-{i}", "prompt": f"Question {i}?", "answer": f"{opening} Number {i}."}
            for i in range(items)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def make_study(folder: Path, items: int = 6, graders: tuple[str, ...] = ("ada", "grace")) -> dict[str, str]:
    """Write a study into folder / "study", and give back the tokens by name, the owner's among them."""
    systems = [system for path in write_answers(folder, items) for system in read_systems(path)]
    study = create(folder / "study", systems)
    with Log(folder / "study" / "votes.jsonl", study, new=True) as log:
        tokens = {"owner": log.add_link("owner", "owner")}
        return tokens | {name: log.add_link("grader", name) for name in graders}


def vote(log: Log, grader: str, seat: Seat, choice: Choice, comment: str = "") -> None:
    log.append(Vote(time=now(), grader=grader, comparison=seat.key, choice=choice, comment=comment))


def side(seat: Seat, opening: str) -> Literal["left", "right"]:
    """Where the answer is that begins like this."""
    return "left" if seat.item.answers[seat.left].startswith(opening) else "right"


def standing(state: State) -> dict[str, dict[str, str]]:
    """grader -> comparison -> choice."""
    return {grader: {key: vote.choice for key, vote in votes.items()} for grader, votes in state.votes.items()}
