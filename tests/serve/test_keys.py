"""Keys: what the file holds, who gets in, and `whet keys`."""

from __future__ import annotations

import hmac
import json
import multiprocessing
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.road import Here
from whet.errors import WhetError
from whet.serve import keys
from whet.serve.errors import ApiError
from whet.serve.limits import Allowance

NOW = datetime(2027, 1, 31, 12, tzinfo=UTC)


def refused(ring: keys.KeyRing, token: str, now: datetime = NOW) -> ApiError:
    with pytest.raises(ApiError) as error:
        ring.find(token, now)
    return error.value


def test_a_key_gets_in_and_the_file_does_not_hold_it(tmp_path: Path) -> None:
    """Catches a file from which keys can be read."""
    path = tmp_path / "keys.json"
    token = keys.add(path, "billing", models=["tuned"], endpoints=["chat"], allowance=Allowance(60, 1000, 2))
    found = keys.KeyRing(path).find(token, NOW).identity()
    assert (found.name, found.models, found.endpoints) == ("billing", {"tuned"}, {"chat"})
    assert found.allowance == Allowance(60, 1000, 2)
    assert token.split("-")[2] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_keys_of_one_secret_have_two_digests() -> None:
    """Catches a digest without a salt, by which equal secrets show."""
    assert keys.digest("00" * 16, "a") != keys.digest("01" * 16, "a")


@pytest.mark.parametrize("change", ["id", "secret", "case", "short", "spaces", "empty"])
def test_other_tokens_do_not_get_in(tmp_path: Path, change: str) -> None:
    path = tmp_path / "keys.json"
    token = keys.add(path, "a")
    prefix, identifier, secret = token.split("-")
    other = {
        "id": f"{prefix}-{'0' * 8}-{secret}",
        "secret": f"{prefix}-{identifier}-{'0' * 64}",
        "case": f"{prefix}-{identifier}-{secret.upper()}",
        "short": token[:-1],
        "spaces": token + "\n",
        "empty": "",
    }[change]
    if other == token:
        pytest.skip("a secret without letters")
    assert refused(keys.KeyRing(path), other).status == 401


def test_an_unknown_id_costs_what_a_wrong_secret_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer that comes sooner for ids that do not exist, and a comparison that stops at a difference."""
    path = tmp_path / "keys.json"
    token = keys.add(path, "a")
    ring = keys.KeyRing(path)
    compared: list[tuple[int, int]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((len(a), len(b)))
        return hmac.compare_digest(a, b)

    class Watched:
        new = staticmethod(hmac.new)
        compare_digest = staticmethod(compare)

    monkeypatch.setattr(keys, "hmac", Watched)
    words = {refused(ring, f"{token[:14]}{'0' * 64}").message, refused(ring, f"whet-{'0' * 8}-{'0' * 64}").message}
    assert compared == [(64, 64), (64, 64)]
    assert len(words) == 1, "the words tell which ids exist"


def test_a_key_ends_on_time_and_when_revoked(tmp_path: Path) -> None:
    """Catches keys that outlive their end, and a server that must be restarted to refuse one."""
    path = tmp_path / "keys.json"
    token = keys.add(path, "a", expires=NOW)
    ring = keys.KeyRing(path)
    assert ring.find(token, NOW - timedelta(seconds=1)).name == "a"
    assert refused(ring, token).code == "expired_api_key"
    keys.revoke(path, "a")
    assert refused(ring, token, NOW - timedelta(days=1)).code == "revoked_api_key"
    assert keys.add(path, "a") != token, "the name is free again"


@pytest.mark.parametrize("fault", ["others write", "not json", "other fields", "a bad digest"])
def test_a_file_that_can_not_be_trusted_lets_nobody_in(tmp_path: Path, fault: str) -> None:
    """Catches a server that goes on with old keys, or none, when its file is broken under it."""
    path = tmp_path / "keys.json"
    token = keys.add(path, "a")
    ring = keys.KeyRing(path)
    ring.find(token, NOW)
    if fault == "others write":
        path.chmod(0o666)
    elif fault == "not json":
        path.write_text("{")
    elif fault == "other fields":
        path.write_text(json.dumps({"version": 1, "keys": [], "extra": 1}))
    else:
        path.write_text(path.read_text().replace('"id"', '"ID"'))
    assert refused(ring, token).status == 503
    with pytest.raises(WhetError):
        keys.read(path)


def test_a_file_that_is_gone_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    token = keys.add(path, "a")
    ring = keys.KeyRing(path)
    ring.find(token, NOW)
    path.unlink()
    assert refused(ring, token).status == 401


def _add(path: Path, name: str) -> None:
    keys.add(path, name)


def test_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    """Catches two processes that write over each other."""
    path = tmp_path / "keys.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add, args=(path, f"k{number}")) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(key.name for key in keys.read(path)) == [f"k{number}" for number in range(6)]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("12h", NOW + timedelta(hours=12)),
        ("30d", NOW + timedelta(days=30)),
        ("2w", NOW + timedelta(weeks=2)),
        ("2027-01-31", datetime(2027, 2, 1, tzinfo=UTC)),
    ],
)
def test_ends_are_read(text: str, end: datetime) -> None:
    assert keys.until(text, NOW) == end


@pytest.mark.parametrize("text", ["2027-01-30", "soon", "-3d", "30", "2027-02-30", "2027-02-01T00:00:00+14:00", ""])
def test_no_key_ends_in_the_past_or_never_by_mistake(text: str) -> None:
    with pytest.raises(WhetError, match="no time to come"):
        keys.until(text, NOW)


def test_the_command_line_makes_lists_and_ends_keys(here: Here, tmp_path: Path) -> None:
    made = here(
        "keys",
        "add",
        "ci",
        "--model",
        "tuned",
        "--endpoint",
        "chat",
        "--expires",
        "30d",
        "--file",
        "k.json",
        cwd=tmp_path,
    )
    assert made.code == 0
    assert keys.TOKEN.fullmatch(made.out.strip()), "only the key goes to stdout, for scripts"
    listed = here("keys", "list", "--file", "k.json", cwd=tmp_path)
    assert "ci  valid  tuned; chat, until " in listed.out
    assert made.out.strip()[14:] not in listed.out
    assert here("keys", "revoke", "ci", "--file", "k.json", cwd=tmp_path).code == 0
    assert "ci  revoked" in here("keys", "list", "--file", "k.json", cwd=tmp_path).out


@pytest.mark.parametrize(
    "arguments",
    [
        ("add", "a b"),
        ("add", "../x"),
        ("add", "x", "--endpoint", "root"),
        ("add", "x", "--expires", "2020-01-01"),
        ("revoke", "nobody"),
    ],
)
def test_what_is_no_key_is_said(here: Here, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    told = here("keys", *arguments, "--file", "k.json", cwd=tmp_path)
    assert told.code == 2
    assert "fix" in told.err
