"""JSON Web Tokens: whose are believed, and what they allow."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from tests.serve.tokens import AUDIENCE, ISSUER, claims, key_set, pem, private_keys, public, token
from whet.errors import WhetError
from whet.serve.auth import Identity
from whet.serve.errors import ApiError
from whet.serve.jwt import FileKeySet, Rules, Tokens, UrlKeySet, parse

RULES = Rules(ISSUER, AUDIENCE)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return Tokens(RULES, FileKeySet(key_set(tmp_path / "jwks.json")))


def who(tokens: Tokens, text: str) -> Identity:
    return asyncio.run(tokens.identify(text))


def refused(tokens: Tokens, text: str) -> ApiError:
    with pytest.raises(ApiError) as error:
        who(tokens, text)
    return error.value


@pytest.mark.parametrize(("kid", "algorithm"), [("rsa", "RS256"), ("ec", "ES256"), ("ed", "EdDSA")])
def test_a_good_token_gets_in(tokens: Tokens, kid: str, algorithm: str) -> None:
    found = who(tokens, token(kid, algorithm))
    assert (found.id, found.name) == ("jwt:ada", "ada")
    assert found.endpoints == {"chat", "completions", "embeddings", "models"}
    assert found.models is None


@pytest.mark.parametrize(
    ("given", "endpoints", "models"),
    [
        ({"scope": "whet:chat whet:model:tuned"}, {"chat"}, {"tuned"}),
        ({"scope": None, "scp": ["whet:embeddings"]}, {"embeddings"}, None),
        ({"scope": None, "roles": ["whet:chat", "whet:metrics", "admin"]}, {"chat", "metrics"}, None),
        ({"scope": "whet:all whet:root"}, {"chat", "completions", "embeddings", "models"}, None),
    ],
)
def test_scopes_say_what_is_allowed(tokens: Tokens, given: dict[str, Any], endpoints: set[str], models: Any) -> None:
    found = who(tokens, token(**given))
    assert (found.endpoints, found.models) == (endpoints, models)


@pytest.mark.parametrize(
    "given",
    [
        {"scope": None},
        {"scope": "openid"},
        {"scope": "chat all"},
        {"scope": "whet:model:x"},
        {"scope": {"whet:all": 1}},
        {"scope": 7},
        {"scope": [["whet:all"]]},
    ],
)
def test_a_token_for_something_else_gets_nowhere(tokens: Tokens, given: dict[str, Any]) -> None:
    """Catches the provider's token for another service that opens this one."""
    assert refused(tokens, token(**given)).status == 403


PAST, FUTURE = 1_000_000_000, 4_000_000_000  # 2001 and 2096: ids that hold the time differ between test processes


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": PAST},
        {"exp": None},
        {"exp": "soon"},
        {"exp": 1e400},
        {"exp": {"a": 1}},
        {"nbf": FUTURE},
        {"iat": FUTURE},
        {"iss": "https://evil.example.org"},
        {"iss": None},
        {"iss": [ISSUER]},
        {"aud": "other"},
        {"aud": None},
        {"aud": ["other"]},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "a" * 256},
    ],
    ids=str,
)
def test_a_token_with_wrong_claims_is_refused(tokens: Tokens, changes: dict[str, Any]) -> None:
    assert refused(tokens, token(**changes)).status == 401


def _b64(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def forged(header: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    signed = f"{_b64(header)}.{_b64(claims())}"
    return f"{signed}.{_b64(sign(signed.encode()))}"


def hmac_of(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda text: hmac.new(secret, text, hashlib.sha256).digest()


def test_algorithms_are_pinned(tokens: Tokens) -> None:
    """Catches none, the public key as a secret of HMAC, and another algorithm of the same family."""
    jwk = json.dumps(public("rsa")).encode()
    for text in (
        forged({"alg": "none", "kid": "rsa"}, lambda _: b""),
        forged({"alg": "None", "kid": "rsa"}, lambda _: b""),
        forged({"alg": "HS256", "kid": "rsa"}, hmac_of(pem("rsa"))),
        forged({"alg": "HS256", "kid": "rsa"}, hmac_of(jwk)),
        forged({"alg": "HS256", "kid": "rsa"}, hmac_of(b"")),
        forged({"alg": ["RS256"], "kid": "rsa"}, lambda _: b""),
        forged({"alg": "RS256", "kid": ["rsa"]}, lambda _: b""),
        token(algorithm="RS512"),
        token(algorithm="PS256"),
    ):
        assert refused(tokens, text).status == 401


def test_a_signature_must_be_the_issuers(tokens: Tokens) -> None:
    """Catches a key that the token brings itself, an empty signature, and a body changed after signing."""
    mine = rsa.generate_private_key(65537, 2048)
    my_jwk = json.loads(RSAAlgorithm.to_jwk(mine.public_key()))
    import jwt

    own = jwt.encode(claims(), mine, "RS256", headers={"kid": "rsa", "jwk": my_jwk, "jku": "https://evil.example.org"})
    head, body, signature = token().split(".")
    other = _b64(claims(sub="admin"))
    for text in (
        own,
        f"{head}.{body}.",
        f"{head}.{other}.{signature}",
        f"{head}.{body}.{signature[:-4]}AAAA",
        "a.b.c",
        "x",
    ):
        assert refused(tokens, text).status == 401


def test_a_key_is_for_its_own_algorithm_alone(tmp_path: Path) -> None:
    """Catches an RS256 token by a key that the issuer publishes for PS256, and one by a key for encryption."""
    rules = Rules(ISSUER, AUDIENCE, ("RS256", "PS256"))
    only_ps = Tokens(rules, FileKeySet(key_set(tmp_path / "a", public("rsa", alg="PS256"))))
    assert refused(only_ps, token()).status == 401
    assert who(only_ps, token(algorithm="PS256")).name == "ada"
    encryption = Tokens(rules, FileKeySet(key_set(tmp_path / "b", public("rsa", use="enc"), public("ec"))))
    assert refused(encryption, token()).status == 401


def test_unknown_critical_headers_are_refused(tokens: Tokens) -> None:
    assert refused(tokens, token(header={"crit": ["exp2"], "exp2": 1})).status == 401


def test_without_a_key_id_only_one_key_may_fit(tmp_path: Path) -> None:
    import jwt

    text = jwt.encode(claims(), private_keys()["rsa"], "RS256")
    one = Tokens(RULES, FileKeySet(key_set(tmp_path / "one", public("rsa"), public("ec"))))
    two = Tokens(RULES, FileKeySet(key_set(tmp_path / "two", public("rsa"), public("rsa", kid="old"))))
    assert who(one, text).name == "ada"
    assert refused(two, text).status == 401


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"keys": []}',
        '{"keys": [7]}',
        '{"keys": [{"kty": "oct", "kid": "a", "k": "c2VjcmV0"}]}',
        '{"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]}',
        json.dumps({"keys": [json.loads(RSAAlgorithm.to_jwk(private_keys()["rsa"]))]}),
        json.dumps({"keys": [json.loads(RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key()))]}),
    ],
    ids=["empty", "object", "list", "no keys", "number", "secret", "short modulus", "private", "1024 bits"],
)
def test_a_key_set_that_is_not_fit_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    """Catches secrets, private and weak keys, and a server that starts without any key."""
    path = tmp_path / "jwks.json"
    path.write_text(text)
    with pytest.raises(WhetError):
        FileKeySet(path)


def test_keys_are_changed_without_a_restart(tmp_path: Path) -> None:
    """Catches a withdrawn key that still lets in, and a broken file that does."""
    path = key_set(tmp_path / "jwks.json", public("rsa"))
    tokens = Tokens(RULES, FileKeySet(path))
    assert who(tokens, token()).name == "ada"
    path.unlink()
    key_set(path, public("ec"))
    assert refused(tokens, token()).status == 401
    assert who(tokens, token("ec", "ES256")).name == "ada"
    path.write_text("{")
    assert refused(tokens, token("ec", "ES256")).status == 503


@pytest.mark.parametrize("rules", [("", AUDIENCE), (ISSUER, "")])
def test_rules_without_an_issuer_or_audience_are_none(rules: tuple[str, str]) -> None:
    with pytest.raises(WhetError, match="any token"):
        Rules(*rules)
    with pytest.raises(WhetError, match="HS256"):
        Rules(ISSUER, AUDIENCE, ("RS256", "HS256"))


# ---------------------------------------------------------------- key sets from an address


@pytest.mark.parametrize(
    "url", ["http://id.example.org/jwks", "file:///etc/passwd", "ftp://x/y", "https://", "https://a:b@c/"]
)
def test_key_sets_come_by_tls_or_not_at_all(url: str) -> None:
    with pytest.raises(WhetError):
        UrlKeySet(url)


class Provider:
    """Serves a key set on this machine, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked, self.status, self.body, self.location = 0, 200, b"", ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                self.send_response(outer.status)
                if outer.location:
                    self.send_header("Location", outer.location)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, *kids: str) -> None:
        self.body = json.dumps({"keys": [public(kid) for kid in kids]}).encode()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.server.shutdown()
    made.server.server_close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_fetched_key_set_is_kept_and_new_keys_are_found(provider: Provider) -> None:
    """Catches a provider that is asked for every token, or by everybody who makes up key ids."""
    clock = Clock()
    tokens = Tokens(RULES, UrlKeySet(provider.url, clock))
    provider.publish("rsa")
    for _ in range(3):
        assert who(tokens, token()).name == "ada"
    assert provider.asked == 1
    for number in range(5):
        assert refused(tokens, token(header={"kid": f"made-up-{number}"})).status == 401
    assert provider.asked == 1
    clock.now += 20
    provider.publish("rsa", "ec")
    assert who(tokens, token("ec", "ES256")).name == "ada"
    assert provider.asked == 2


@pytest.mark.parametrize("fault", ["500", "redirect", "not json", "too long", "down"])
def test_a_provider_that_fails_lets_nobody_in_for_ever(provider: Provider, fault: str) -> None:
    """Catches keys that never end because the provider can't be asked, and redirections to somebody else's."""
    clock = Clock()
    tokens = Tokens(RULES, UrlKeySet(provider.url, clock))
    provider.publish("rsa")
    assert who(tokens, token()).name == "ada"
    good = provider.body
    if fault == "500":
        provider.status = 500
    elif fault == "redirect":
        provider.status, provider.location = 302, provider.url
    elif fault == "not json":
        provider.body = b"<html>"
    elif fault == "too long":
        provider.body = good + b" " * 2**20
    else:
        provider.server.shutdown()
        provider.server.server_close()
    clock.now += 299
    assert who(tokens, token()).name == "ada"
    clock.now += 2
    assert refused(tokens, token()).status == 503


def test_parse_names_its_source() -> None:
    with pytest.raises(WhetError, match="here"):
        parse(b"", "here")
