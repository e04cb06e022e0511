"""An identity provider in a file: keys of each kind, and tokens by them."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ISSUER, AUDIENCE = "https://id.example.org", "whet"


@cache
def private_keys() -> dict[str, Any]:
    """By key id."""
    return {
        "rsa": rsa.generate_private_key(65537, 2048),
        "ec": ec.generate_private_key(ec.SECP256R1()),
        "ed": ed25519.Ed25519PrivateKey.generate(),
    }


def public(kid: str, /, **more: Any) -> dict[str, Any]:
    makers: dict[str, Any] = {"rsa": RSAAlgorithm, "ec": ECAlgorithm, "ed": OKPAlgorithm}
    entry: dict[str, Any] = json.loads(makers[kid].to_jwk(private_keys()[kid].public_key()))
    entry.pop("key_ops", None)
    return {**entry, "kid": kid, "use": "sig", **more}


def pem(kid: str) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    text: bytes = private_keys()[kid].public_key().public_bytes(serialization.Encoding.PEM, form)
    return text


def key_set(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"keys": list(entries) or [public(kid) for kid in private_keys()]}))
    return path


def claims(**changes: Any) -> dict[str, Any]:
    """Of a good token; None takes one away."""
    now = int(time.time())
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": now + 600, "scope": "openid whet:all"}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def token(kid: str = "rsa", algorithm: str = "RS256", header: dict[str, Any] | None = None, **changes: Any) -> str:
    body = json.dumps(claims(**changes)).encode()  # jwt.encode would refuse to make a bad one
    return jwt.PyJWS().encode(body, private_keys()[kid], algorithm, headers={"kid": kid, **(header or {})})
