"""What somebody outside might try. Each case is refused, reaches no engine, and leaves the server serving."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.gateways import CHAT, Gateway, gateway
from tests.serve.scripted import Scripted
from tests.serve.tokens import AUDIENCE, ISSUER, key_set, token
from whet.serve import keys, server
from whet.serve.auth import ALL_ENDPOINTS, Authenticator
from whet.serve.jwt import FileKeySet, Rules, Tokens
from whet.serve.limits import Limits, Settings

BODY = json.dumps(CHAT).encode()
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, str]]]:
    """A gateway that takes keys and tokens, and the keys by name: some are good for little."""
    folder = tmp_path_factory.mktemp("hostile")
    path = folder / "keys.json"
    now = datetime.now(UTC)
    found = {
        "all": keys.add(path, "all", endpoints=ALL_ENDPOINTS),
        "expired": keys.add(path, "expired", expires=now - timedelta(seconds=1)),
        "embeddings": keys.add(path, "embeddings", endpoints=["embeddings"]),
        "words": keys.add(path, "words", models=["words"]),
        "revoked": keys.add(path, "revoked"),
    }
    keys.revoke(path, "revoked")
    jwt = Tokens(Rules(ISSUER, AUDIENCE), FileKeySet(key_set(folder / "jwks.json")))
    auth = Authenticator(keys.KeyRing(path), jwt)
    settings = Settings(max_body=MAX_BODY, body_patience=0.5)
    with gateway(Scripted(), auth=auth, settings=settings, hosts=server.LOOPBACK, limits=Limits()) as up:
        up.token = found["all"]
        yield up, found


@pytest.fixture
def up(made: tuple[Gateway, dict[str, str]]) -> Iterator[Gateway]:
    """Checks afterwards that nothing was asked of the engine, and that an honest client is served."""
    made[0].engine.asked.clear()
    yield made[0]
    assert made[0].engine.asked == [], "a hostile request reached the engine"
    assert made[0].post().status_code == 200
    made[0].wait_until(lambda: made[0].parts.limits.running == 0)


@pytest.fixture
def names(made: tuple[Gateway, dict[str, str]]) -> dict[str, str]:
    return made[1]


def refused(response: httpx2.Response, status: int) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    assert b"Traceback" not in answer
    return int(answer[9:12])


# ---------------------------------------------------------------- keys

WRONG: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "no key": lambda _: {},
    "an empty key": lambda _: {"authorization": "Bearer"},
    "another scheme": lambda k: {"authorization": f"Basic {k['all']}"},
    "no scheme": lambda k: {"authorization": k["all"]},
    "a wrong secret": lambda k: {"authorization": f"Bearer {k['all'][:-1]}{'0' if k['all'][-1] != '0' else '1'}"},
    "a secret of another key": lambda k: {"authorization": f"Bearer {k['words'][:14]}{k['all'][14:]}"},
    "an expired key": lambda k: {"authorization": f"Bearer {k['expired']}"},
    "a revoked key": lambda k: {"authorization": f"Bearer {k['revoked']}"},
    "a key and a comma": lambda k: {"authorization": f"Bearer {k['all']}, Bearer {k['words']}"},
    "a key in another header": lambda k: {"x-api-key": k["all"]},
    "a key in a cookie": lambda k: {"cookie": f"authorization=Bearer {k['all']}"},
    "a header that proxies set": lambda _: {"x-forwarded-user": "admin", "x-real-ip": "127.0.0.1"},
    "a token of another issuer": lambda _: {"authorization": f"Bearer {token(iss='https://evil.example.org')}"},
    "an expired token": lambda _: {"authorization": f"Bearer {token(exp=1)}"},
    "a very long token": lambda _: {"authorization": f"Bearer {'a.' * 8000}"},
}


@pytest.mark.parametrize("case", WRONG)
def test_who_has_no_good_key_is_refused(up: Gateway, names: dict[str, str], case: str) -> None:
    response = up.client.post("/v1/chat/completions", json=CHAT, headers=WRONG[case](names))
    refused(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"
    assert not any(name in response.text for name in ("scripted", "all", "words")), "names are given away"


def test_a_key_in_the_address_is_no_key(up: Gateway) -> None:
    """It would end up in the logs of every proxy on the way."""
    for name in ("key", "api_key", "access_token", "authorization"):
        response = up.client.post(f"/v1/chat/completions?{name}={up.token}", json=CHAT)
        refused(response, 401)


def test_two_keys_in_one_request_are_none(up: Gateway, names: dict[str, str]) -> None:
    """Catches a proxy that checks the first, and a server that takes the last."""
    answer = up.raw(up.request(BODY, f"Authorization: Bearer {names['words']}", "Connection: close"))
    assert status_of(answer) == 401


def test_a_key_for_embeddings_does_not_chat(up: Gateway, names: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {names['embeddings']}"}
    refused(up.client.post("/v1/chat/completions", json=CHAT, headers=headers), 403)
    refused(up.client.get("/metrics", headers=headers), 403)
    refused(up.client.get("/v1/models", headers=headers), 403)


def test_a_key_for_one_model_learns_nothing_of_others(up: Gateway, names: dict[str, str]) -> None:
    """Catches words that differ between a model that is not there and one that is not for this key."""
    headers = {"authorization": f"Bearer {names['words']}"}
    texts = []
    for model in ("scripted", "missing"):
        response = up.client.post("/v1/chat/completions", json=CHAT | {"model": model}, headers=headers)
        refused(response, 404)
        texts.append(response.text.replace(model, "MODEL"))
        refused(up.client.get(f"/v1/models/{model}", headers=headers), 404)
    assert texts[0] == texts[1]
    listed = up.client.get("/v1/models", headers=headers).json()["data"]
    assert [card["id"] for card in listed] == ["words"]


def test_scopes_hold_under_every_spelling_of_an_address(up: Gateway, names: dict[str, str]) -> None:
    """Catches a check of the address as text that the router reads otherwise."""
    for path in (
        "//v1/chat/completions",
        "/v1/./chat/completions",
        "/v1/x/../chat/completions",
        "/v1/chat/completions/",
        "/v1/chat%2Fcompletions",
        "/V1/chat/completions",
        "/health/../v1/chat/completions",
        "/page/../v1/chat/completions",
        "/v1/chat/completions;x",
        "/%76%31/chat/completions",
    ):
        request = up.request(BODY, "Connection: close", path=path).replace(
            up.token.encode(), names["embeddings"].encode()
        )
        assert status_of(up.raw(request)) in (401, 403, 404), path
        unknown = up.request(BODY, "Connection: close", path=path).replace(up.token.encode(), b"whet-0-0")
        assert status_of(up.raw(unknown)) in (401, 404), path


# ---------------------------------------------------------------- bodies


def test_a_long_body_is_refused_before_it_is_read(up: Gateway) -> None:
    """Catches a server that first takes in the gigabyte that was announced."""
    head = up.request(b"", f"Content-Length: {2**40}", "Connection: close", length=False)
    assert status_of(up.raw(head)) == 413


def test_a_long_body_without_a_length_is_cut_off(up: Gateway) -> None:
    chunks = b"".join(b"1000\r\n" + b" " * 4096 + b"\r\n" for _ in range(40)) + b"0\r\n\r\n"
    assert status_of(up.raw(up.request(chunks, "Transfer-Encoding: chunked", length=False))) == 413


def test_a_slow_body_is_not_waited_for(up: Gateway) -> None:
    assert status_of(up.raw(up.request(b"{", "Content-Length: 100", length=False))) == 408


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"model": "\\ud800"}',
        b"[" * 5000,
        b'{"a":' * 3000,
        b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
        b'{"model": "scripted", "messages": [{"role": "user", "content": "x"}], "max_tokens": true}',
        b'{"model": "scripted", "messages": {"role": "user"}}',
        b'"text"',
        b"null",
        b"7",
    ],
    ids=lambda body: body[-24:].decode("latin-1"),
)
def test_a_body_that_is_no_request_is_the_clients_fault(up: Gateway, body: bytes) -> None:
    """Catches parsers that end in a 500: bad UTF-8, halves of pairs, nesting, NaN, endless numbers."""
    assert status_of(up.raw(up.request(body, "Connection: close"))) == 400


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_forms_of_web_pages_are_not_read(up: Gateway, kind: str) -> None:
    """Catches what a page elsewhere can send without asking the browser."""
    assert status_of(up.raw(up.request(BODY, f"Content-Type: {kind}", "Connection: close"))) == 415


def test_compressed_bodies_are_not_unpacked(up: Gateway) -> None:
    """Catches a bomb of a few kilobytes."""
    bomb = gzip.compress(b" " * 10_000_000)
    assert status_of(up.raw(up.request(bomb, "Content-Encoding: gzip", "Connection: close"))) == 415


# ---------------------------------------------------------------- framing

SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: +5"],
        ["Content-Length: 5, 6"],
        ["Content-Length: -5"],
        ["Content-Length: 0x5"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding : chunked"],
        ["Host: evil.example.org"],
        ["Content-Type: application/json", "Content-Type: text/plain"],
    ],
    ids=" | ".join,
)
def test_requests_that_two_machines_read_differently_are_refused(up: Gateway, headers: list[str]) -> None:
    """Catches request smuggling: one answer alone comes back, and the connection ends."""
    answer = up.raw(up.request(b"0\r\n\r\n" + SMUGGLED, *headers, length=False))
    assert status_of(answer) in (400, 415, 501)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\x00c\r\n\r\n",
        b"GET /health\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["no host", "TLS", "long address", "long header", "NUL in a header", "NUL in the address"],
)
def test_what_is_no_http_is_refused(up: Gateway, request_line: bytes) -> None:
    answer = up.raw(request_line)
    assert answer == b"" or status_of(answer) in (400, 431)


def test_line_breaks_do_not_get_into_answers_or_logs(up: Gateway) -> None:
    """Catches a header, or a line of the log, that a client writes."""
    body = json.dumps(CHAT | {"model": "x\r\nSet-Cookie: a=b\r\n\r\n{}"}).encode()
    answer = up.raw(up.request(body, "Connection: close", "X-Request-Id: a%0d%0aX: 1"))
    head, _, text = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 404
    assert b"set-cookie" not in head.lower()
    assert b"\n" not in text
    assert all(json.loads(line)["id"].startswith("req_") for line in up.log.getvalue().splitlines())


def test_a_head_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches connections that cost nothing to open and are kept for ever (slowloris)."""
    monkeypatch.setattr(server, "HEAD_PATIENCE", 0.3)
    with gateway(Scripted()) as other, socket.create_connection(other.address, timeout=20) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""
        assert other.get("/health").status_code == 200


# ---------------------------------------------------------------- names, hosts, other pages


@pytest.mark.parametrize(
    "model",
    [
        "../../etc/passwd",
        "..\\..\\windows",
        "/etc/passwd",
        "secret/../secret/adapter",
        "scripted/../../x",
        "scripted\x00",
        "SCRIPTED",
        "scripted ",
        "https://evil.example.org/model",
        "%2e%2e%2f",
        "{{7*7}}",
        "a" * 256,
    ],
)
def test_a_models_name_is_a_name_and_no_path(up: Gateway, model: str) -> None:
    """Catches path traversal in adapters' names: no file is looked up, and nothing is fetched."""
    refused(up.post(body=CHAT | {"model": model}), 404)
    up.engine.asked.clear()


def test_paths_in_the_address_of_a_model_lead_nowhere(up: Gateway) -> None:
    for path in ("/v1/models/../../etc/passwd", "/v1/models/%2e%2e/%2e%2e/etc/passwd", "/page/../../pyproject.toml"):
        request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {up.token}\r\nConnection: close\r\n\r\n"
        )
        assert status_of(up.raw(request.encode())) == 404, path


@pytest.mark.parametrize(
    "host", ["evil.example.org", "127.0.0.1.evil.example.org", "localhost@evil.example.org", "0.0.0.0", ""]
)
def test_other_names_for_this_machine_are_not_served(up: Gateway, host: str) -> None:
    """Catches a web page whose own name was made to point here (DNS rebinding)."""
    request = up.request(BODY, "Connection: close").replace(b"Host: localhost", f"Host: {host}".encode())
    assert status_of(up.raw(request)) == 421


@pytest.mark.parametrize("origin", ["https://evil.example.org", "null", "http://localhost.evil.example.org", "file://"])
def test_other_web_pages_are_not_served(up: Gateway, origin: str) -> None:
    assert status_of(up.raw(up.request(BODY, f"Origin: {origin}", "Connection: close"))) == 403


def test_pages_of_other_ports_of_this_machine_are_not_served(up: Gateway) -> None:
    """Catches a development server's page, which browsers count as the same site."""
    for site in ("same-site", "cross-site"):
        refused(up.post(headers={"sec-fetch-site": site}), 403)
    assert up.get("/v1/models", **{"sec-fetch-site": "same-origin"}).status_code == 200


def test_no_page_is_allowed_in_by_cors(up: Gateway) -> None:
    preflight = {"origin": up.url, "access-control-request-method": "POST"}
    response = up.client.request("OPTIONS", "/v1/chat/completions", headers=preflight | up.auth)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


def test_a_body_where_none_belongs_is_not_taken(up: Gateway) -> None:
    """Catches bytes after a GET that the next machine takes for a request."""
    for header in (f"Content-Length: {len(SMUGGLED)}", "Transfer-Encoding: chunked"):
        head = f"GET /health HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode()
        answer = up.raw(head + SMUGGLED)
        assert status_of(answer) == 400
        assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "FOO"])
def test_other_methods_do_nothing(up: Gateway, method: str) -> None:
    head = f"{method} /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {up.token}\r\n"
    assert status_of(up.raw(f"{head}Connection: close\r\n\r\n".encode())) in (400, 405)


def test_answers_tell_browsers_to_be_careful(up: Gateway) -> None:
    headers = up.get("/v1/models").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "server" not in headers


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("address", "authenticated", "refusal"),
    [
        (server.Address("0.0.0.0"), False, "without a key"),
        (server.Address("0.0.0.0"), True, "unencrypted"),
        (server.Address("::"), True, "unencrypted"),
        (server.Address("192.0.2.1", plain_http=True), False, "without a key"),
        (server.Address("example.org"), True, "unencrypted"),
        (server.Address("0.0.0.0", certificate=Path("x"), key=Path("y")), False, "without a key"),
    ],
)
def test_no_open_door_to_other_machines(address: server.Address, authenticated: bool, refusal: str) -> None:
    from whet.errors import WhetError

    with pytest.raises(WhetError, match=refusal):
        address.check(authenticated=authenticated)


def test_this_machine_and_tls_are_fine() -> None:
    server.Address().check(authenticated=False)
    server.Address("::1").check(authenticated=False)
    server.Address("0.0.0.0", certificate=Path("x"), key=Path("y")).check(authenticated=True)
    server.Address("0.0.0.0", plain_http=True).check(authenticated=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0", "--no-auth"], "without a key"),
        (["--host", "0.0.0.0", "--keys", "none.json"], "unencrypted"),
        (["--keys", "none.json"], "no valid key"),
        (["--keys", "open.json"], "others may write"),
        (["--no-auth", "--keys", "none.json"], "nobody would be asked"),
        (["--jwks", "jwks.json"], "any token"),
        (["--jwt-issuer", "x"], "without keys"),
        (["--no-auth", "--adapter", "x"], "NAME=DIR"),
        (["--no-auth", "--engine", "magic"], "unknown engine"),
    ],
)
def test_a_server_that_would_be_unsafe_does_not_start(
    here: Any, tmp_path: Path, arguments: list[str], words: str
) -> None:
    keys.add(tmp_path / "open.json", "a")
    (tmp_path / "open.json").chmod(0o666)
    key_set(tmp_path / "jwks.json")
    told = here("serve", "builtin:tiny", "--port", "0", *arguments, cwd=tmp_path)
    assert told.code == 2
    assert words in told.err
