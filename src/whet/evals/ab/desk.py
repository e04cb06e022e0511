"""What the pages share: the study, its votes, who is signed in, and what bodies of requests hold."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.exceptions import HTTPException
from pydantic import BaseModel, ConfigDict, Field

from whet.evals.ab.study import Seat, Study
from whet.evals.ab.votes import COMMENT_LENGTH, NAME_LENGTH, Choice, Log, Role

SIGNED_IN = 90 * 24 * 3600
"""Seconds that a browser stays signed in."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Joining(_Body):
    token: Annotated[str, Field(max_length=100)]


class Voting(_Body):
    choice: Choice
    comment: Annotated[str, Field(max_length=COMMENT_LENGTH)] = ""


class Linking(_Body):
    name: Annotated[str, Field(max_length=NAME_LENGTH)]


class Desk:
    """What the pages share: the study, its votes, and each grader's seats, worked out once."""

    def __init__(self, study: Study, log: Log, *, secure: bool):
        self.study, self.log, self.secure = study, log, secure
        self._seats: dict[str, tuple[Seat, ...]] = {}

    def seats(self, grader: str) -> tuple[Seat, ...]:
        if grader not in self._seats:
            self._seats[grader] = self.study.seats(grader)
        return self._seats[grader]

    def seat(self, grader: str, position: int) -> Seat:
        seats = self.seats(grader)
        if not 1 <= position <= len(seats):
            raise HTTPException(404, f"there is no comparison {position}")
        return seats[position - 1]

    def cookie(self, role: Role) -> str:
        """Of one study and role: studies on other ports, and an owner who grades too, have cookies of their own."""
        return f"{'__Host-' if self.secure else ''}whet-ab-{self.study.id}-{role}"

    def signed_in(self, request: Request, role: Role) -> str:
        """The name of who asks. Raises 401."""
        who = self.log.state.who(request.cookies.get(self.cookie(role), ""))
        if who is None or who[0] != role:
            raise HTTPException(401, "Open the link you were given to sign in.")
        return who[1]


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


def _grader(request: Request) -> str:
    return _desk(request).signed_in(request, "grader")


def _owner(request: Request) -> str:
    return _desk(request).signed_in(request, "owner")


AtDesk = Annotated[Desk, Depends(_desk)]
AsGrader = Annotated[str, Depends(_grader)]
AsOwner = Annotated[str, Depends(_owner)]
