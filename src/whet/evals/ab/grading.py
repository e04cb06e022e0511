"""What graders ask for. All of it names positions in the grader's own order, and sides as left and right."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import HTMLResponse

from whet.evals.ab import pages
from whet.evals.ab.desk import SIGNED_IN, AsGrader, AtDesk, Joining, Voting
from whet.evals.ab.markdown import tree
from whet.evals.ab.votes import COMMENT_LENGTH, Undone, Vote, now

router = APIRouter()


@router.get("/")
def page() -> HTMLResponse:
    """The same bytes for everybody; who is signed in shows only in what its script then asks for."""
    return pages.page("grade.html")


@router.get("/join")
def join_page() -> HTMLResponse:
    """A link is /join#TOKEN: what follows # stays in the browser, and in no log on the way."""
    return pages.page("join.html")


@router.post("/api/join")
def join(body: Joining, request: Request, response: Response, desk: AtDesk) -> dict[str, str]:
    who = desk.log.state.who(body.token)
    if who is None:
        raise HTTPException(401, "This link is not valid, or a newer one took its place.")
    role, _ = who
    response.set_cookie(
        desk.cookie(role), body.token, max_age=SIGNED_IN, path="/", secure=desk.secure, httponly=True, samesite="strict"
    )
    return {"role": role}


@router.get("/api/study")
def study(grader: AsGrader, desk: AtDesk) -> dict[str, Any]:
    """votes: by position. last: the position of the latest one."""
    state, seats = desk.log.state, desk.seats(grader)
    votes = state.votes[grader]
    positions = {seat.key: position for position, seat in enumerate(seats, 1)}
    return {
        "id": desk.study.id,
        "title": desk.study.title,
        "question": desk.study.question,
        "grader": grader,
        "votes": [votes[seat.key].choice if seat.key in votes else None for seat in seats],
        "last": positions[next(reversed(votes))] if votes else None,
        "closed": state.closed is not None,
        "comment_length": COMMENT_LENGTH,
    }


@router.get("/api/comparisons/{position}")
def comparison(position: int, grader: AsGrader, desk: AtDesk) -> dict[str, Any]:
    seat = desk.seat(grader, position)
    vote = desk.log.state.votes[grader].get(seat.key)
    return {
        "position": position,
        "prompt": seat.item.prompt,
        "reference": seat.item.reference if desk.study.show_reference else None,
        "left": _answer(seat.item.answers[seat.left]),
        "right": _answer(seat.item.answers[seat.right]),
        "vote": vote.choice if vote else None,
        "comment": vote.comment if vote else "",
    }


@router.put("/api/comparisons/{position}/vote")
def vote(position: int, body: Voting, grader: AsGrader, desk: AtDesk) -> dict[str, bool]:
    """Answered once the vote is on the disk."""
    seat = desk.seat(grader, position)
    desk.log.append(Vote(time=now(), grader=grader, comparison=seat.key, choice=body.choice, comment=body.comment))
    return {"saved": True}


@router.delete("/api/comparisons/{position}/vote")
def undo(position: int, grader: AsGrader, desk: AtDesk) -> dict[str, bool]:
    seat = desk.seat(grader, position)
    desk.log.append(Undone(time=now(), grader=grader, comparison=seat.key))
    return {"saved": True}


def _answer(text: str) -> dict[str, Any]:
    return {"text": text, "tree": tree(text)}
