"""JSON Web Tokens (RFC 7519) of an identity provider, checked against its published keys (JWKS, RFC 7517).

A token is believed when its signature is by a key of the set, under an algorithm pinned here and meant for that key,
and it names this issuer and audience, a subject, and an end that has not come. Only public-key algorithms: were a
secret shared by HMAC, whoever can check tokens could make them; and a public key must never be taken for a secret.
Addresses and keys that a token brings along (jku, x5u, jwk) are not looked at.

What its bearer may do stands in the claims `scope` or `scp` (text or a list) and `roles`:
`whet:chat`, `whet:completions`, `whet:embeddings`, `whet:models`, `whet:metrics`, or `whet:all` for the first four;
`whet:model:NAME` for one model alone. A token without any of the first six gets nowhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from whet.addresses import is_loopback
from whet.errors import WhetError
from whet.serve.auth import ALL_ENDPOINTS, ENDPOINTS, Identity
from whet.serve.errors import ApiError

logger = logging.getLogger("whet.serve")

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
OF_CURVE = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
DEFAULT = ("RS256", "ES256", "EdDSA")

LEEWAY = 30
"""Seconds that two machines' clocks may differ by."""
KEPT = 300.0
"""Seconds that a fetched key set is good for; a key withdrawn there ends here that much later."""
BETWEEN = 15.0
"""Seconds between two fetches: tokens with made-up key ids must not make this server ask all the time."""
SIZE = 2**20
"""Bytes of a key set at most."""
RSA_BITS = 2048
SUBJECT = 255
"""Characters of a subject at most; OpenID Connect's own limit."""
PRIVATE_FIELDS = ("d", "p", "q", "k")


@dataclass(frozen=True)
class Rules:
    """What a token must say. algorithms: of ALGORITHMS."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...] = DEFAULT

    def __post_init__(self) -> None:
        if unknown := [name for name in self.algorithms if name not in ALGORITHMS]:
            fix = f"use some of {', '.join(ALGORITHMS)}"
            raise WhetError(f"not taken for tokens: {', '.join(unknown)}", where="--jwt-algorithm", fix=fix)
        if not self.algorithms or not self.issuer or not self.audience:
            fix = "give --jwt-issuer and --jwt-audience"
            raise WhetError("any token of the key set would be taken", where="--jwks", fix=fix)


@dataclass(frozen=True)
class PublicKey:
    """key: of `cryptography`. algorithms: those that it is for."""

    id: str | None
    key: Any
    algorithms: frozenset[str]


class KeySet(Protocol):
    async def keys(self, wanted: str | None) -> list[PublicKey]:
        """The keys now. wanted: the id looked for, which may be newer than what is known. Raises ApiError (503)."""
        ...


class Tokens:
    """Tells who a token is for."""

    def __init__(self, rules: Rules, keys: KeySet):
        self.rules, self._keys = rules, keys

    async def identify(self, token: str) -> Identity:
        import jwt

        try:
            header = jwt.get_unverified_header(token)
            identifier, algorithm = header.get("kid"), header.get("alg")
        except Exception:  # whatever is wrong with text from outside makes it no token
            raise ApiError(401, "This key is not valid.") from None
        if algorithm not in self.rules.algorithms or not isinstance(identifier, str | None):
            raise ApiError(401, "The token's algorithm is not accepted.")
        key = _chosen(await self._keys.keys(identifier), identifier, str(algorithm))
        return identity(self._claims(token, key, str(algorithm)))

    def _claims(self, token: str, key: PublicKey, algorithm: str) -> Mapping[str, Any]:
        import jwt

        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[algorithm],
                audience=self.rules.audience,
                issuer=self.rules.issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise ApiError(401, "This token is expired.", code="expired_api_key") from None
        except Exception as error:  # PyJWT's own errors, and those of numbers and keys that are not what they should be
            logger.info("a token was refused: %s", type(error).__name__)
            raise ApiError(401, "This key is not valid.") from None
        return claims


def identity(claims: Mapping[str, Any]) -> Identity:
    """Raises ApiError: 403 for a token that is good, but allows nothing here."""
    scopes = {scope.removeprefix("whet:") for scope in _scopes(claims) if scope.startswith("whet:")}
    endpoints = frozenset(scopes & set(ALL_ENDPOINTS)) | (frozenset(ENDPOINTS) if "all" in scopes else frozenset())
    models = frozenset(scope.removeprefix("model:") for scope in scopes if scope.startswith("model:"))
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= SUBJECT:
        raise ApiError(401, "This key is not valid.")
    if not endpoints:
        raise ApiError(403, "The token has none of the scopes whet:chat, whet:embeddings, whet:all, and so on.")
    return Identity(id=f"jwt:{subject}", name=subject[:64], models=models or None, endpoints=endpoints)


def _scopes(claims: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in ("scope", "scp", "roles"):
        value = claims.get(name, [])
        parts = value.split() if isinstance(value, str) else value
        found += [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []
    return found


def _chosen(keys: list[PublicKey], identifier: str | None, algorithm: str) -> PublicKey:
    """The key that a token names; without a name, the only one there is for the algorithm."""
    fitting = [key for key in keys if algorithm in key.algorithms and identifier in (None, key.id)]
    if len(fitting) != 1:
        raise ApiError(401, "No key of the issuer fits this token.")
    return fitting[0]


# ---------------------------------------------------------------- key sets


def parse(text: bytes, where: str) -> list[PublicKey]:
    """The keys of a set that are for signatures. Raises WhetError for a set that is not one, or not fit to be used."""
    try:
        entries = json.loads(text)["keys"]
        keys = [_public_key(entry, where) for entry in entries if entry.get("use", "sig") == "sig"]
    except WhetError:
        raise
    except Exception as error:
        fix = "give a JSON Web Key Set: the jwks_uri of your identity provider, or a file of what it holds"
        raise WhetError("no JSON Web Key Set", where=where, fix=fix) from error
    if not keys:
        raise WhetError("the key set holds no key for signatures", where=where, fix="give the issuer's own jwks_uri")
    return keys


def _public_key(entry: Mapping[str, Any], where: str) -> PublicKey:
    import jwt

    if private := [name for name in PRIVATE_FIELDS if name in entry]:
        what = f"a key that is secret ({', '.join(private)}) in what others may read"
        raise WhetError(what, where=where, fix="publish the public key alone, and make a new pair")
    made = jwt.PyJWK.from_dict(dict(entry))
    if entry["kty"] == "RSA" and made.key.key_size < RSA_BITS:
        raise WhetError(f"an RSA key of {made.key.key_size} bits", where=where, fix=f"use {RSA_BITS} bits or more")
    return PublicKey(entry.get("kid"), made.key, _algorithms(entry))


def _algorithms(entry: Mapping[str, Any]) -> frozenset[str]:
    """Those a key may be used with: the one it names, or those of its kind."""
    kinds = {"RSA": ALGORITHMS[:6], "EC": (OF_CURVE.get(entry.get("crv", ""), ""),), "OKP": ("EdDSA",)}
    of_kind = frozenset(kinds.get(entry["kty"], ()))
    return of_kind & {entry["alg"]} if "alg" in entry else of_kind


class FileKeySet:
    """A file, read again when it changes."""

    def __init__(self, path: Path):
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._found: list[PublicKey] = []
        self._read()

    async def keys(self, wanted: str | None) -> list[PublicKey]:
        try:
            self._read()
        except WhetError as error:
            logger.error("%s", error)
            self._stamp = None
            raise ApiError(503, "Tokens can not be checked now.", code="keys_unavailable", retry_after=5) from error
        return self._found

    def _read(self) -> None:
        try:
            stat = self.path.stat()
            if (stamp := (stat.st_mtime_ns, stat.st_ino)) == self._stamp:
                return
            text = self.path.read_bytes()
        except OSError as error:
            fix = "give a file that holds the issuer's JWKS"
            raise WhetError(f"can not be read: {error.strerror}", where=str(self.path), fix=fix) from error
        self._found, self._stamp = parse(text, str(self.path)), stamp


class UrlKeySet:
    """An address of HTTPS (or of this machine), asked when its answer is too old, or lacks the key that is wanted.

    Redirections are not followed: the keys come from where the operator said, or not at all.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic):
        parts = urlsplit(url)
        if not parts.hostname or parts.scheme not in ("https", "http") or parts.username:
            raise WhetError(f"{url!r} is no address", where="--jwks", fix="give one like https://id.example.org/jwks")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise WhetError("keys fetched without TLS could be anybody's", where="--jwks", fix="use https://")
        self.url, self._clock = url, clock
        self._found: list[PublicKey] = []
        self._good_until = self._next_fetch = float("-inf")
        self._lock = asyncio.Lock()

    async def keys(self, wanted: str | None) -> list[PublicKey]:
        if not self._fresh(wanted):
            async with self._lock:
                if not self._fresh(wanted):
                    await self._fetch()
        if self._clock() >= self._good_until:
            raise ApiError(503, "Tokens can not be checked now.", code="keys_unavailable", retry_after=5)
        return self._found

    def _fresh(self, wanted: str | None) -> bool:
        known = wanted is None or any(key.id == wanted for key in self._found)
        now = self._clock()
        return (now < self._good_until and known) or now < self._next_fetch

    async def _fetch(self) -> None:
        self._next_fetch = self._clock() + BETWEEN
        try:
            self._found = parse(await fetch(self.url), self.url)
            self._good_until = self._clock() + KEPT
        except Exception as error:  # the network's many ways to fail; keys that are still good stay in use
            logger.error("the key set can not be had from %s: %s: %s", self.url, type(error).__name__, error)


async def fetch(url: str) -> bytes:
    """What an address holds, if it answers 200 within ten seconds and SIZE bytes."""
    import httpx2

    async with (
        httpx2.AsyncClient(timeout=10, follow_redirects=False) as client,
        client.stream("GET", url, headers={"accept": "application/json"}) as answer,
    ):
        if answer.status_code != 200:
            raise ConnectionError(f"HTTP {answer.status_code}")
        text = b""
        async for part in answer.aiter_bytes():
            text += part
            if len(text) > SIZE:
                raise ConnectionError(f"more than {SIZE} bytes")
        return text
