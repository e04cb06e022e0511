"""The application: the routes, behind the gate, over an engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from whet.serve.access_log import AccessLog
from whet.serve.drain import Drain
from whet.serve.errors import ApiError, from_validation, unforeseen
from whet.serve.gate import Gate, Identifies
from whet.serve.interface import Engine
from whet.serve.limits import Limits, Settings
from whet.serve.metrics import Metrics
from whet.serve.page import router as page
from whet.serve.routes import Desk, router

NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""FastAPI would otherwise give spans, and what requests hold, to exporters that the environment names."""


@dataclass
class Parts:
    """What stands around the engine; each has a part in every request. page: whether the chat page is served too."""

    auth: Identifies
    settings: Settings = field(default_factory=Settings)
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    log: AccessLog = field(default_factory=AccessLog)
    drain: Drain = field(default_factory=Drain)
    hosts: Collection[str] = ()
    page: bool = True


def make_app(engine: Engine, parts: Parts) -> Gate:
    """The ASGI application. It answers 503 until `parts.drain.ready`, which whoever starts the engine sets."""
    app = routes_over(engine, parts)
    return Gate(
        app,
        auth=parts.auth,
        limits=parts.limits,
        settings=parts.settings,
        metrics=parts.metrics,
        log=parts.log,
        drain=parts.drain,
        hosts=parts.hosts,
    )


def routes_over(engine: Engine, parts: Parts) -> FastAPI:
    """Without the gate."""
    app = FastAPI(
        title="whet serve",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    app.state.desk = Desk(engine, parts.settings, parts.metrics, parts.drain)
    app.include_router(router)
    if parts.page:
        app.include_router(page)
    for error in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(error, _told)
    return app


def _told(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        refusal = from_validation(error.errors())
    elif isinstance(error, HTTPException):
        refusal = _of_http(request, error)
    else:
        refusal = error if isinstance(error, ApiError) else unforeseen()
    request.state.record.error = refusal.code or str(refusal.status)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    """The router's own: no such address, or not by that method."""
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return ApiError(404, f"Invalid URL ({request.method}).", code="unknown_url", headers=headers)
    return ApiError(error.status_code, f"{error.detail}.", headers=headers)
