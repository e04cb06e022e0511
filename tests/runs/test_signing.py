"""Keys of the ledger: made once, read from files that nobody else can read."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import WhetError
from whet.runs.signing import (
    VARIABLE,
    fingerprint,
    holds,
    key_in_use,
    load_private,
    load_public,
    make_key,
    sign,
)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_key(tmp_path / "ledger.key")
    return tmp_path / "ledger.key"


def test_a_key_signs_and_its_public_half_verifies(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(key))
    private, public = key_in_use(), load_public(key.with_name("ledger.key.pub"))
    assert private is not None
    assert fingerprint(private.public_key()) == fingerprint(public)
    signature = sign(private, b"message")
    assert holds(signature, b"message", public)
    assert not holds(signature, b"massage", public)
    monkeypatch.delenv(VARIABLE)
    assert key_in_use() is None


def test_only_its_owner_can_read_a_key(key: Path) -> None:
    """Catches a key that everyone on the machine can sign with."""
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o640)
    with pytest.raises(WhetError, match="others may read this key"):
        load_private(key)


def test_a_key_is_never_overwritten(key: Path, tmp_path: Path) -> None:
    """Catches a second `whet runs key` that makes every earlier signature worthless."""
    before = key.read_bytes()
    with pytest.raises(WhetError, match="never overwritten"):
        make_key(key)
    (tmp_path / "ledger.key.pub").rename(tmp_path / "other.pub")
    with pytest.raises(WhetError, match="never overwritten"):
        make_key(key)
    with pytest.raises(WhetError, match="never overwritten"):
        make_key(tmp_path / "other")
    assert key.read_bytes() == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("load", "name", "told"),
    [
        (load_private, "ledger.key.pub", "no Ed25519 private key"),
        (load_private, "nothing", "no such key file"),
        (load_private, ".", "cannot read the key"),
        (load_private, "text", "no Ed25519 private key"),
        (load_public, "ledger.key", "no Ed25519 public key"),
        (load_public, "text", "no Ed25519 public key"),
    ],
)
def test_what_is_no_key_is_told(key: Path, load: Callable[[Path], object], name: str, told: str) -> None:
    (key.parent / "text").write_text("no key\n")
    for path in ("text", "ledger.key.pub"):
        (key.parent / path).chmod(0o600)
    with pytest.raises(WhetError, match=told) as error:
        load(key.parent / name)
    assert key.read_text().splitlines()[1] not in str(error.value)


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(WhetError, match=r'pip install "whet\[sign\]"'):
        make_key(tmp_path / "key")
    assert not (tmp_path / "key").exists()


@given(signature=st.none() | st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_what_is_no_signature_does_not_hold(signature: str | None) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    assert not holds(signature, b"message", Ed25519PrivateKey.generate().public_key())


def test_a_signature_has_one_spelling(key: Path) -> None:
    """Catches base64 whose last digit may change without the signature doing so: a tampering that is not found."""
    private = load_private(key)
    signature = sign(private, b"message")
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = digits[digits.index(signature[-3]) ^ 1]
    assert not holds(signature[:-3] + last + "==", b"message", private.public_key())
