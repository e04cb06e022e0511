"""Refusals in the form that OpenAI's clients know: {"error": {"message", "type", "param", "code"}}.

The client's library raises by the status: 400 BadRequestError, 401 AuthenticationError, 403 PermissionDeniedError,
404 NotFoundError, 429 RateLimitError, 5xx InternalServerError.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from whet.serve.interface import Busy, EngineDown, Refused, UnknownModel

logger = logging.getLogger("whet.serve")

INVALID = "invalid_request_error"
RATE = "rate_limit_error"
SERVER = "server_error"

STATUS_CODES = {401: "invalid_api_key", 403: "insufficient_permissions", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """An answer other than the one asked for. param: the request's field at fault. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or STATUS_CODES.get(status)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def type(self) -> str:
        if self.status == 429:
            return RATE
        return SERVER if self.status >= 500 else INVALID

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def no_such_model(name: str) -> ApiError:
    """The same words for a model that is not there and one that the key may not use: names are not given away."""
    what = f"The model {name[:200]!r} does not exist, or this key may not use it."
    return ApiError(404, what, param="model", code="model_not_found")


def from_engine(error: Exception, model: str = "") -> ApiError | None:
    """What an engine's refusal is over HTTP; None for a fault of its own, which nobody foresaw."""
    if isinstance(error, UnknownModel):
        return no_such_model(model)
    if isinstance(error, Refused):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, Busy):
        return ApiError(429, f"Overloaded: {error}.", code="overloaded", retry_after=error.retry_after)
    if isinstance(error, EngineDown):
        logger.error("the engine is down: %s", error)
        return ApiError(503, "The model's engine is down.", code="engine_down", retry_after=5)
    return None


def unforeseen() -> ApiError:
    """What went wrong is for the server's own log, and no business of the client's."""
    return ApiError(500, "The server had an error while it made the answer.", code="internal_error")


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's faults, by the name of its field. The value at fault is not repeated."""
    first = errors[0]
    # ("body", "messages", 0, "user", "content"): what is no key of the request names a branch of a union
    path = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(part for part in path if not part.startswith(("function-", "tagged-"))) or None
    kind = first["type"]
    if kind == "extra_forbidden":
        message = f"Unknown or unsupported field: {field}."
    elif kind == "json_invalid":
        message, field = "The body is not valid JSON.", None
    else:
        message = f"{field}: {first['msg']}." if field else f"{first['msg']}."
    return ApiError(400, message.replace("Value error, ", ""), param=path[0] if field and path else None)
