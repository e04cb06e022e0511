"""API keys: whet-ID-SECRET, of which the file holds the ID and a keyed digest of the secret.

The secret has 256 random bits. Nobody can try them all, so its digest needs no slow hash, which would cost every
request a tenth of a second and let anybody keep the server busy with wrong keys. Each key has a salt of its own.

The file is JSON, written whole, and read again when it changes: a revoked key ends at once, without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from stat import S_IWGRP, S_IWOTH

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from whet.errors import WhetError
from whet.files import whole_file
from whet.serve.auth import ALL_ENDPOINTS, ENDPOINTS, Identity
from whet.serve.errors import ApiError
from whet.serve.limits import Allowance

logger = logging.getLogger("whet.serve")

TOKEN = re.compile(r"whet-([0-9a-f]{8})-([0-9a-f]{64})")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
DURATION = re.compile(r"(\d{1,5})([hdw])")
UNITS = {"h": "hours", "d": "days", "w": "weeks"}


class Key(BaseModel):
    """One key, as the file holds it. digest: HMAC-SHA256 of the secret under `salt`, in hex. models: None for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    name: str
    salt: str
    digest: str
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None
    models: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] = ENDPOINTS
    requests_per_minute: int | None = Field(None, gt=0)
    tokens_per_minute: int | None = Field(None, gt=0)
    concurrent: int | None = Field(None, gt=0)

    def state(self, now: datetime) -> str:
        """valid, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"

    def identity(self) -> Identity:
        return Identity(
            id=f"key:{self.id}",
            name=self.name,
            models=None if self.models is None else frozenset(self.models),
            endpoints=frozenset(self.endpoints),
            allowance=Allowance(self.requests_per_minute, self.tokens_per_minute, self.concurrent),
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(1, ge=1, le=1)
    keys: list[Key] = []


# ---------------------------------------------------------------- the file


def default_path() -> Path:
    """keys.json in the user's folder of settings."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "whet" / "keys.json"


def read(path: Path) -> list[Key]:
    """All keys, the newest last; none where there is no file. Raises WhetError for a file that can't be trusted."""
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        fix = "give the file of `whet keys`, readable for this user"
        raise WhetError(f"the keys can not be read: {error.strerror}", where=str(path), fix=fix) from error
    if mode & (S_IWGRP | S_IWOTH):
        raise WhetError("others may write this file, and add keys", where=str(path), fix=f"chmod 600 {path}")
    try:
        return _File.model_validate_json(text).keys
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        fix = "restore it, or remove it and make new keys with `whet keys add`"
        raise WhetError(f"no file of keys: {place} {first['msg']}", where=str(path), fix=fix) from error


def add(
    path: Path,
    name: str,
    *,
    models: Sequence[str] | None = None,
    endpoints: Sequence[str] = ENDPOINTS,
    expires: datetime | None = None,
    allowance: Allowance | None = None,
) -> str:
    """A new key. Returns it: from then on, only its digest is left. Raises WhetError."""
    allowance = allowance or Allowance()
    if NAME.fullmatch(name) is None:
        raise WhetError(f"{name!r} is no name", where="name", fix="use letters, digits and . _ @ -, up to 64")
    if unknown := [one for one in endpoints if one not in ALL_ENDPOINTS]:
        raise WhetError(
            f"unknown endpoints: {', '.join(unknown)}", where="--endpoints", fix=f"use {', '.join(ALL_ENDPOINTS)}"
        )
    if not endpoints or (models is not None and not models):
        raise WhetError("a key that may use nothing", where=name, fix="name at least one model and one endpoint")
    with _changing(path) as keys:
        if any(key.name == name and key.revoked is None for key in keys):
            raise WhetError(f"there is a key called {name}", where=str(path), fix=f"whet keys revoke {name}")
        key, token = new(name, models=models, endpoints=endpoints, expires=expires, allowance=allowance)
        keys.append(key)
    return token


def new(
    name: str,
    *,
    models: Sequence[str] | None = None,
    endpoints: Sequence[str] = ENDPOINTS,
    expires: datetime | None = None,
    allowance: Allowance | None = None,
) -> tuple[Key, str]:
    """A key and its token, in no file."""
    identifier, secret, salt = secrets.token_hex(4), secrets.token_hex(32), secrets.token_hex(16)
    allowance = allowance or Allowance()
    key = Key(
        id=identifier,
        name=name,
        salt=salt,
        digest=digest(salt, secret),
        created=datetime.now(UTC),
        expires=expires,
        models=None if models is None else tuple(models),
        endpoints=tuple(endpoints),
        requests_per_minute=allowance.requests_per_minute,
        tokens_per_minute=allowance.tokens_per_minute,
        concurrent=allowance.concurrent,
    )
    return key, f"whet-{identifier}-{secret}"


def revoke(path: Path, who: str) -> Key:
    """End a key, by name or id; its line stays, for those who ask later. Raises WhetError where there is none."""
    with _changing(path) as keys:
        for place, key in enumerate(keys):
            if who in (key.name, key.id) and key.revoked is None:
                keys[place] = key.model_copy(update={"revoked": datetime.now(UTC)})
                return keys[place]
        raise WhetError(f"no key {who!r} to revoke", where=str(path), fix="see `whet keys list`")


def digest(salt: str, secret: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode("ascii"), hashlib.sha256).hexdigest()


def until(text: str, now: datetime) -> datetime:
    """When a key ends: 12h, 30d, 8w from now, or a date, whose day is the last. Raises WhetError."""
    if match := DURATION.fullmatch(text):
        return now + timedelta(**{UNITS[match[2]]: int(match[1])})
    try:
        end = datetime.fromisoformat(text).replace(tzinfo=UTC) + timedelta(days=1)
    except ValueError:
        end = now
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text) is None or end <= now:
        raise WhetError(f"{text!r} is no time to come", where="--expires", fix="use 12h, 30d, 8w or a date, 2027-03-31")
    return end


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys to change, written when the block ends well. One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read(path)
        yield keys
        with whole_file(path) as partial:
            partial.touch(mode=0o600)
            partial.write_text(_File(keys=keys).model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- who a key is


NOBODY, _ = new("nobody")
"""Compared with where the id is unknown, so that the answer takes as long as for a wrong secret."""


class KeyRing:
    """The keys of a file as it is now, or of this run alone (`only`)."""

    def __init__(self, path: Path | None = None, only: Sequence[Key] = ()):
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        self._keys = {key.id: key for key in only}
        self._fault: WhetError | None = None

    async def identify(self, token: str) -> Identity:
        return self.find(token, datetime.now(UTC)).identity()

    def find(self, token: str, now: datetime) -> Key:
        """Raises ApiError: 401, or 503 while the file can't be read, since a key in it may have been revoked."""
        self._refresh()
        match = TOKEN.fullmatch(token)
        if match is None:
            raise ApiError(401, "This key is not valid.")
        key = self._keys.get(match[1], NOBODY)
        same = hmac.compare_digest(digest(key.salt, match[2]), key.digest)
        if not same or key is NOBODY:
            raise ApiError(401, "This key is not valid.")
        if (state := key.state(now)) != "valid":
            raise ApiError(401, f"This key is {state}.", code=f"{state}_api_key")
        return key

    def _refresh(self) -> None:
        if self.path is None:
            return
        stamp = _stamp(self.path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys, self._fault = {key.id: key for key in read(self.path)}, None
            except WhetError as fault:
                logger.error("%s", fault)
                self._keys, self._fault = {}, fault
        if self._fault is not None:
            raise ApiError(503, "Keys can not be checked now.", code="keys_unavailable", retry_after=5)


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when the file does: it is replaced whole, so its inode is another each time."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode
