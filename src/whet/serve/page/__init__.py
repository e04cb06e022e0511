"""The chat page at `/`: two models side by side, or one, over the same API that every client uses.

Its files lie beside this one and are sent as they are: no template, so nothing of a request can get into them. They are
given without a key, since they hold nothing; what the page asks of the API needs one, as from anybody else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Response

FOLDER = Path(__file__).parent
SCRIPT = "text/javascript; charset=utf-8"
PARTS = {
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "answer.js": SCRIPT,
    "api.js": SCRIPT,
    "chat.js": SCRIPT,
    "dom.js": SCRIPT,
    "settings.js": SCRIPT,
}
"""What may be asked for under /page/, each with its media type."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "x-frame-options": "DENY",
}
"""Beside those on every answer. Trusted types: a browser that knows them makes no markup out of any text."""

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    return Response(_content("chat.html"), media_type="text/html; charset=utf-8", headers=HEADERS)


@router.get("/page/{name}")
async def part(name: str) -> Response:
    if name not in PARTS:
        raise HTTPException(404)
    return Response(_content(name), media_type=PARTS[name], headers=HEADERS)


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
