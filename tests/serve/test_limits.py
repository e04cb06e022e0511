"""Limits a key, and on all together."""

from __future__ import annotations

import json
import socket

import pytest

from tests.serve.gateways import CHAT, gateway
from tests.serve.scripted import Scripted
from whet.serve import limits as limiting
from whet.serve.errors import ApiError
from whet.serve.limits import Allowance, Limits


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ask(limits: Limits, allowance: Allowance, name: str = "a", tokens: int = 0) -> None:
    with limits.admitted(name, allowance) as account:
        account.spend_tokens(tokens)


def refused(limits: Limits, allowance: Allowance, name: str = "a") -> ApiError:
    with pytest.raises(ApiError) as error, limits.admitted(name, allowance):
        pass
    return error.value


def test_requests_fill_up_evenly(clock: Clock) -> None:
    """Catches a minute's worth that comes back at once, and one that never does."""
    limits, allowance = Limits(clock=clock), Allowance(requests_per_minute=3)
    for _ in range(3):
        ask(limits, allowance)
    refusal = refused(limits, allowance)
    assert (refusal.status, refusal.headers["retry-after"]) == (429, "20")
    clock.now += 19.9
    assert refused(limits, allowance).headers["retry-after"] == "1"
    clock.now += 0.2
    ask(limits, allowance)
    refused(limits, allowance)


def test_tokens_are_paid_afterwards_and_debts_are_waited_for(clock: Clock) -> None:
    """Catches a limit on tokens that one long answer escapes."""
    limits, allowance = Limits(clock=clock), Allowance(tokens_per_minute=60)
    ask(limits, allowance, tokens=180)
    assert refused(limits, allowance).headers["retry-after"] == "121"
    clock.now += 121
    ask(limits, allowance)


def test_keys_do_not_pay_for_each_other(clock: Clock) -> None:
    limits, allowance = Limits(clock=clock), Allowance(requests_per_minute=1)
    ask(limits, allowance, "a")
    refused(limits, allowance, "a")
    ask(limits, allowance, "b")


def test_a_place_comes_back_when_a_request_fails(clock: Clock) -> None:
    """Catches places that errors use up."""
    limits, allowance = Limits(clock=clock), Allowance(concurrent=1)

    def fails() -> None:
        with limits.admitted("a", allowance):
            assert refused(limits, allowance).status == 429
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    ask(limits, allowance)
    assert limits.running == 0


def test_changed_limits_count_what_runs(clock: Clock) -> None:
    """Catches an account that is forgotten, with its running requests, when its key's limits change."""
    limits = Limits(clock=clock)
    with limits.admitted("a", Allowance(concurrent=1)):
        refused(limits, Allowance(concurrent=1, requests_per_minute=5))
    ask(limits, Allowance(concurrent=1, requests_per_minute=5))


def test_a_keys_own_limits_go_before_the_servers(clock: Clock) -> None:
    limits = Limits(Allowance(requests_per_minute=1), clock=clock)
    ask(limits, Allowance(requests_per_minute=2))
    ask(limits, Allowance(requests_per_minute=2))
    refused(limits, Allowance(requests_per_minute=2))
    ask(limits, Allowance(), "b")
    refused(limits, Allowance(), "b")


def test_accounts_do_not_pile_up_and_debts_are_not_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with every subject of a token, and a debt that others' requests wash away."""
    monkeypatch.setattr(limiting, "REMEMBERED", 10)
    limits, allowance = Limits(clock=clock), Allowance(requests_per_minute=5)
    for number in range(50):
        ask(limits, allowance, f"s{number}")
        clock.now += 60
    assert len(limits._accounts) <= 11
    for _ in range(5):
        ask(limits, allowance, "debtor")
    for number in range(50):
        ask(limits, allowance, f"t{number}")
    refused(limits, allowance, "debtor")


def test_over_http_a_limit_says_when_to_come_back() -> None:
    with gateway(Scripted(), limits=Limits(Allowance(requests_per_minute=2, tokens_per_minute=1000))) as up:
        first = up.post()
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        up.post()
        third = up.post()
        assert third.status_code == 429
        assert 1 <= int(third.headers["retry-after"]) <= 31
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        assert len(up.engine.asked) == 2


def test_too_many_requests_at_once_are_turned_away_and_then_served() -> None:
    """Catches back-pressure that turns into errors of the server, or into a queue without end."""
    with gateway(Scripted(hold=True), limits=Limits(in_flight=2)) as up:
        clients = [socket.create_connection(up.address) for _ in range(2)]
        for client in clients:
            client.sendall(up.request(json.dumps(CHAT).encode()))
        up.wait_until(lambda: up.engine.running == 2)
        response = up.post()
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert up.get("/health").status_code == 200
        up.in_loop(up.engine.go_on.set)
        up.wait_until(lambda: up.engine.running == 0)
        assert up.post().status_code == 200
        for client in clients:
            client.close()
