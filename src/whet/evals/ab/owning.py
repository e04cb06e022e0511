"""What the study's owner asks for: how far graders are, and after the end the results. Before it, no vote is shown."""

from __future__ import annotations

from datetime import datetime

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import HTMLResponse

from whet.errors import WhetError
from whet.evals.ab import export, pages
from whet.evals.ab.desk import AsOwner, AtDesk, Desk, Linking
from whet.evals.ab.results import Results, results
from whet.evals.ab.votes import NAME_LENGTH, Closed, now, tidy_name

router = APIRouter()


@router.get("/owner")
def page(request: Request, desk: AtDesk) -> HTMLResponse:
    try:
        desk.signed_in(request, "owner")
    except HTTPException as error:
        return pages.page("sign_in.html.jinja", status=error.status_code, why=error.detail)
    state = desk.log.state
    found = _results(desk) if state.closed else None
    total = len(desk.study.comparisons)
    progress = [(name, len(state.votes[name]), _latest(desk, name)) for name in state.graders]
    return pages.page(
        "owner.html.jinja",
        study=desk.study,
        total=total,
        progress=progress,
        results=found,
        name_length=NAME_LENGTH,
        shown=export.shown,
        share=export.share,
        number=export.number,
        moment=_moment,
    )


@router.post("/api/owner/links")
def add_link(body: Linking, owner: AsOwner, desk: AtDesk) -> dict[str, str]:
    """A new grader's link, or for one who is there already a new link in the place of the old one."""
    if (name := tidy_name(body.name)) is None:
        raise HTTPException(422, f"A name has 1 to {NAME_LENGTH} letters.")
    return {"name": name, "token": desk.log.add_link("grader", name)}


@router.post("/api/owner/close")
def close(owner: AsOwner, desk: AtDesk) -> dict[str, bool]:
    desk.log.append(Closed(time=now()))
    return {"closed": True}


@router.get("/api/owner/results.json")
def results_json(owner: AsOwner, desk: AtDesk) -> Response:
    return _download(desk, export.as_json(_results(desk)), "application/json", "results.json")


@router.get("/api/owner/votes.csv")
def votes_csv(owner: AsOwner, desk: AtDesk) -> Response:
    return _download(desk, export.as_csv(_results(desk)), "text/csv; charset=utf-8", "votes.csv")


def _results(desk: Desk) -> Results:
    """Raises 409 while the study is open."""
    try:
        return results(desk.study, desk.log.state)
    except WhetError as error:
        raise HTTPException(409, "Results are there once the study is closed.") from error


def _latest(desk: Desk, grader: str) -> str | None:
    return max((vote.time for vote in desk.log.state.votes[grader].values()), default=None)


def _moment(time: str) -> str:
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M} UTC"


def _download(desk: Desk, text: str, kind: str, name: str) -> Response:
    headers = {"content-disposition": f'attachment; filename="{desk.study.id}-{name}"'}
    return Response(text, media_type=kind, headers=headers)
