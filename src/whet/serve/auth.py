"""Who asks, and what they may: a key of `whet keys`, or a JWT of the company's own identity provider.

Both come as `Authorization: Bearer ...` and nowhere else: a key in an address would end up in the logs of proxies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from whet.serve.errors import ApiError, no_such_model
from whet.serve.limits import Allowance

Headers = Sequence[tuple[bytes, bytes]]

SCOPES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/models": "models",
    "/metrics": "metrics",
}
"""What a key must be allowed, by path."""

ENDPOINTS = ("chat", "completions", "embeddings", "models")
"""What a key may use when nothing else is said. `metrics` tells of everybody's use, so it is given by name only."""

ALL_ENDPOINTS = (*ENDPOINTS, "metrics")

PUBLIC = ("/health", "/ready", "/")
"""Asked without a key: probes, which say one word, and the chat page, which holds nothing."""
PUBLIC_FOLDER = "/page/"

PREFIX = "whet-"
"""Keys begin with it, so that a scanner for leaked secrets can find them."""


@dataclass(frozen=True)
class Identity:
    """id: for limits, stable and unique. name: for logs. models: None for all. endpoints: of ALL_ENDPOINTS."""

    id: str
    name: str
    models: frozenset[str] | None = None
    endpoints: frozenset[str] = frozenset(ENDPOINTS)
    allowance: Allowance = field(default_factory=Allowance)

    def check_endpoint(self, path: str) -> None:
        """Raises ApiError (403). A path that is none of SCOPES' leads to nothing, and is for the router to say."""
        scope = scope_of(path)
        if scope is not None and scope not in self.endpoints:
            raise ApiError(403, f"This key may not use {path}: it lacks the scope {scope!r}.")

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def check_model(self, model: str) -> None:
        """Raises ApiError (404), in the words for a model that is not there."""
        if not self.may_use(model):
            raise no_such_model(model)


ANYBODY = Identity("anybody", "anybody", endpoints=frozenset(ALL_ENDPOINTS))
"""Where no key is asked for: on this machine alone."""


class Finder(Protocol):
    """Knows one sort of credential."""

    async def identify(self, token: str) -> Identity:
        """Raises ApiError: 401 for a token that is not good, 503 where that can't be found out."""
        ...


class Authenticator:
    """keys: for tokens that begin with `whet-`; jwt: for all others. Without both nobody gets in."""

    def __init__(self, keys: Finder | None = None, jwt: Finder | None = None):
        self.keys, self.jwt = keys, jwt

    async def identify(self, headers: Headers) -> Identity:
        token = bearer(headers)
        finder = self.keys if token.startswith(PREFIX) else self.jwt
        if finder is None:
            raise ApiError(401, "This key is not valid.")
        return await finder.identify(token)


class Open:
    """Lets everybody in as ANYBODY. Only for a server that no other machine reaches."""

    async def identify(self, headers: Headers) -> Identity:
        return ANYBODY


def scope_of(path: str) -> str | None:
    return SCOPES["/v1/models"] if path.startswith("/v1/models/") else SCOPES.get(path)


def is_public(path: str) -> bool:
    return path in PUBLIC or path.startswith(PUBLIC_FOLDER)


def bearer(headers: Headers) -> str:
    """The token. Raises ApiError (401) where there is none, or more than one: which of two counts is for no proxy."""
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        raise ApiError(401, "No key: send it as `Authorization: Bearer KEY`.", code="missing_api_key")
    if len(values) > 1:
        raise ApiError(401, "More than one Authorization header.")
    try:
        scheme, _, token = values[0].decode("ascii").partition(" ")
    except UnicodeDecodeError:
        raise ApiError(401, "This key is not valid.") from None
    token = token.strip()
    if scheme.lower() != "bearer" or not token or any(character.isspace() for character in token):
        raise ApiError(401, "The Authorization header is to be `Bearer KEY`.")
    return token
