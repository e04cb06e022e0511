"""The study's web pages: `serve` runs them, `make_app` is the application.

    GET  /          the grader's page       POST /api/join                  a link's token -> a cookie
    GET  /join      where links lead        GET  /api/study                 how far this grader is
    GET  /owner     the owner's page        GET  /api/comparisons/P         the P-th comparison
    GET  /static/X  styles and scripts      PUT  /api/comparisons/P/vote    vote; DELETE takes it back
                                            POST /api/owner/links           add a grader
                                            POST /api/owner/close           end the study
                                            GET  /api/owner/results.json    after the end; votes.csv as well

A grader's requests and what they get name positions in that grader's own order, and sides as left and right. Nothing
else depends on which system is where: were the systems exchanged and the sides too, every byte would be the same.
"""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from whet.addresses import is_loopback
from whet.errors import WhetError
from whet.evals.ab import grading, owning, pages
from whet.evals.ab.desk import Desk
from whet.evals.ab.guard import Guard
from whet.evals.ab.study import Study, load
from whet.evals.ab.votes import Log, StudyClosed

logger = logging.getLogger("whet.ab")

NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""FastAPI would otherwise give spans, and what requests hold, to exporters that the environment names."""

HTTPS_PORT, HTTP_PORT = 443, 80
CLOSED = "The study is closed. Thank you."
NOT_SAVED = "Not saved: the server cannot write. Please tell who sent you the link."


def make_app(study: Study, log: Log, *, hosts: Collection[str], secure: bool) -> Guard:
    """hosts: names, with ports, under which browsers may ask. secure: they come by HTTPS, and cookies say so."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)
    app.state.desk = Desk(study, log, secure=secure)
    app.include_router(grading.router)
    app.include_router(owning.router)
    app.add_api_route("/static/{name}", pages.static, include_in_schema=False)
    for error in (HTTPException, RequestValidationError, WhetError, OSError):
        app.add_exception_handler(error, _told)
    return Guard(app, hosts)


def _told(_: Request, error: Exception) -> Response:
    """A refusal in words for the page. What went wrong with the disk is for the server's own terminal."""
    if isinstance(error, StudyClosed):
        return JSONResponse({"error": CLOSED}, 409)
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    if isinstance(error, RequestValidationError):
        return JSONResponse({"error": "The request is not as the page makes it."}, 422)
    logger.error("%s", error)
    return JSONResponse({"error": NOT_SAVED}, 503)


def serve(
    folder: Path,
    *,
    ready: Callable[[str], None],
    host: str = "127.0.0.1",
    port: int = 8017,
    certificate: Path | None = None,
    key: Path | None = None,
    url: str | None = None,
    plain_http: bool = False,
) -> None:
    """Serve the study in `folder` until a signal ends it. port 0: any that is free.

    url: the address that graders open, where it is another than this machine's own. plain_http: other machines may
    ask without encryption, as in a network you trust or behind a proxy that does TLS. ready: told the address, once
    requests are taken. Raises WhetError before anything is opened for an address that would be unsafe.
    """
    _check_address(host, certificate=certificate, url=url, plain_http=plain_http)
    study = load(folder)
    with Log(folder / "votes.jsonl", study) as log, _listening(host, port) as listener:
        port = listener.getsockname()[1]
        scheme = "https" if certificate else "http"
        address = url or f"{scheme}://{_netloc(host, port, scheme)}"
        app = make_app(study, log, hosts=_hosts(host, port, scheme, url), secure=address.startswith("https:"))
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=256,
            timeout_graceful_shutdown=5,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            fix = "give a certificate and its key, both in PEM"
            raise WhetError(f"TLS cannot start: {error}", where=str(certificate), fix=fix) from error
        ready(address)
        uvicorn.Server(config).run(sockets=[listener])


# ---------------------------------------------------------------- addresses


def _check_address(host: str, *, certificate: Path | None, url: str | None, plain_http: bool) -> None:
    if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc):
        raise WhetError(f"{url!r} is no address", where="--url", fix="give one like https://ab.example.org")
    if is_loopback(host):
        return
    if certificate is None and not plain_http:
        fix = "give --certificate and --key, or --plain-http behind a proxy that does TLS or in a network you trust"
        raise WhetError("other machines would ask without encryption", where=f"--host {host}", fix=fix)
    if url is None:
        fix = "say under which address graders open it: --url https://ab.example.org"
        raise WhetError("requests under any name would be taken", where=f"--host {host}", fix=fix)


def _hosts(host: str, port: int, scheme: str, url: str | None) -> set[str]:
    hosts = {_netloc(name, port, scheme) for name in ("127.0.0.1", "localhost", "::1")} if is_loopback(host) else set()
    return hosts | {urlsplit(url).netloc.lower()} if url else hosts | {_netloc(host, port, scheme)}


def _netloc(host: str, port: int, scheme: str) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port == (HTTPS_PORT if scheme == "https" else HTTP_PORT) else f"{name}:{port}"


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        fix = "take another --port, or stop what has it"
        raise WhetError(f"cannot listen: {error}", where=f"{host}:{port}", fix=fix) from error
