"""How much a key may ask for: requests and tokens a minute, and requests at once.

A token bucket holds a minute's worth and fills evenly. Requests are paid when they come. Tokens are counted when an
answer ends, since nobody knows its length before: a bucket may fall below zero, and then the next request waits.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from whet.serve.errors import ApiError

MINUTE = 60.0
REMEMBERED = 10_000
"""Accounts kept at most, though nobody asks any more: a JWT may name any subject."""


@dataclass(frozen=True)
class Allowance:
    """None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None

    def or_else(self, other: Allowance) -> Allowance:
        """This one's limits, and the other's where this one has none."""
        return Allowance(
            self.requests_per_minute if self.requests_per_minute is not None else other.requests_per_minute,
            self.tokens_per_minute if self.tokens_per_minute is not None else other.tokens_per_minute,
            self.concurrent if self.concurrent is not None else other.concurrent,
        )


@dataclass(frozen=True)
class Settings:
    """The server's own bounds, whoever asks. Sizes in bytes, times in seconds."""

    max_body: int = 4 * 2**20
    body_patience: float = 30.0
    """In which a request's body must be there."""
    write_patience: float = 30.0
    """How long a client may read nothing before its answer is dropped."""
    in_flight: int = 512
    """Requests at once, all keys together."""
    max_tokens: int | None = None
    """Of one answer; a request that asks for more is refused."""
    max_choices: int = 8
    """Answers to one request: its `n`, times its prompts."""
    max_inputs: int = 2048
    """Texts of one request for embeddings."""


class Bucket:
    """What is left of a minute's allowance."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def level(self) -> float:
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level() - amount

    def wait(self, amount: float) -> float:
        """Seconds until there is so much; 0: now."""
        return max(0.0, (amount - self.level()) * MINUTE / self.per_minute)


@dataclass
class Account:
    """One key's buckets, and how many of its requests run."""

    allowance: Allowance
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0

    @property
    def idle(self) -> bool:
        full = all(bucket is None or bucket.level() >= bucket.per_minute for bucket in (self.requests, self.tokens))
        return full and not self.running

    def spend_tokens(self, amount: int) -> None:
        if self.tokens is not None:
            self.tokens.take(amount)

    def headers(self) -> dict[str, str]:
        """As OpenAI names them, so that clients can pace themselves."""
        found = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level())))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait(bucket.per_minute):.3f}s"
        return found


@dataclass
class Limits:
    """The accounts by identity. `default` is for what a key says nothing about. clock: monotonic seconds."""

    default: Allowance = field(default_factory=Allowance)
    in_flight: int = Settings.in_flight
    clock: Callable[[], float] = time.monotonic
    running: int = 0
    _accounts: OrderedDict[str, Account] = field(default_factory=OrderedDict)

    @contextmanager
    def admitted(self, identity: str, allowance: Allowance) -> Iterator[Account]:
        """A place for one request while the block runs. Raises ApiError (429) with the time to wait."""
        if self.running >= self.in_flight:
            raise ApiError(429, "Overloaded: too many requests at once.", code="overloaded", retry_after=1)
        account = self._account(identity, allowance.or_else(self.default))
        self._check(account)
        if account.requests is not None:
            account.requests.take(1)
        self.running += 1
        account.running += 1
        try:
            yield account
        finally:
            self.running -= 1
            account.running -= 1

    def _check(self, account: Account) -> None:
        limit = account.allowance.concurrent
        if limit is not None and account.running >= limit:
            raise ApiError(429, f"Rate limit: {limit} requests at once for this key.", retry_after=1)
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None and (seconds := bucket.wait(1)) > 0:
                what = f"Rate limit: {bucket.per_minute} {name} a minute for this key."
                raise ApiError(429, what, retry_after=seconds, headers=account.headers())

    def _account(self, identity: str, allowance: Allowance) -> Account:
        account = self._accounts.setdefault(identity, Account(Allowance(), None, None))
        if account.allowance != allowance:  # new, or its limits were changed; what runs goes on being counted
            account.allowance = allowance
            account.requests = self._bucket(allowance.requests_per_minute)
            account.tokens = self._bucket(allowance.tokens_per_minute)
        self._accounts.move_to_end(identity)
        self._forget()
        return account

    def _bucket(self, per_minute: int | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self.clock)

    def _forget(self) -> None:
        """Drop the accounts that were quiet longest, as far as nothing is lost with them."""
        while len(self._accounts) > REMEMBERED:
            name = next(iter(self._accounts))
            if not self._accounts[name].idle:
                return
            del self._accounts[name]
