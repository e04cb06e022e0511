"""The pages' files: HTML, one style, scripts. Nothing comes from elsewhere, and no page holds a script inside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Response
from fastapi.exceptions import HTTPException
from fastapi.responses import HTMLResponse

FOLDER = Path(__file__).parent
STATIC = {
    "style.css": "text/css; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "join.js": "text/javascript; charset=utf-8",
    "grade.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "owner.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Jinja escapes every value; a name that the template reads and `values` lacks raises jinja2.UndefinedError."""
    return HTMLResponse(_environment().get_template(template).render(values), status)


def static(name: str) -> Response:
    if name not in STATIC:
        raise HTTPException(404, "there is no such file")
    return Response(_content(name), media_type=STATIC[name])


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
