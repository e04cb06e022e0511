"""Ed25519 keys (RFC 8032) that sign a ledger: made once, kept where the runs are not.

The private key is a PEM file that its owner alone can read; the public one, NAME.pub beside it, is for who verifies.
A process signs when the environment variable WHET_LEDGER_KEY names a private key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import WhetError
from whet.files import refused_when_full, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

VARIABLE = "WHET_LEDGER_KEY"
MAKE = "make a key with `whet runs key FILE`"


def make_key(path: Path) -> Path:
    """Write a new private key to `path` and its public one beside it, whose path is returned. Raises WhetError."""
    ed25519, serialization = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = path.with_name(path.name + ".pub")
    if public.exists():
        raise _taken(public)
    with refused_when_full(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise _taken(path) from None
        except FileNotFoundError:
            raise WhetError("there is no such folder", where=str(path.parent), fix="make it first") from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    write_text(public, public_text(key.public_key()))
    return public


def key_in_use() -> Ed25519PrivateKey | None:
    """The private key that WHET_LEDGER_KEY names; None when it is not set. Raises WhetError."""
    path = os.environ.get(VARIABLE)
    return load_private(Path(path)) if path else None


def load_private(path: Path) -> Ed25519PrivateKey:
    """Raises WhetError when there is none, when others may read the file, and when it is no such key."""
    ed25519, serialization = _library()
    content = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise WhetError(f"others may read this key (its mode is {mode:03o})", where=str(path), fix=f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise WhetError("this is no Ed25519 private key", where=str(path), fix=MAKE)
    private: Ed25519PrivateKey = key
    return private


def load_public(path: Path) -> Ed25519PublicKey:
    """Raises WhetError when there is none, and when it is no such key."""
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_public_key(_read(path))
    except ValueError:
        key = None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise WhetError("this is no Ed25519 public key", where=str(path), fix="name the .pub file of the key")
    public: Ed25519PublicKey = key
    return public


def public_text(key: Ed25519PublicKey) -> str:
    """The public key as a PEM file holds it."""
    _, serialization = _library()
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode("ascii")


def fingerprint(key: Ed25519PublicKey) -> str:
    """16 hex digits that name a public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(key: Ed25519PrivateKey, message: bytes) -> str:
    return base64.b64encode(key.sign(message)).decode("ascii")


def holds(signature: object, message: bytes, key: Ed25519PublicKey) -> bool:
    """Whether `signature`, base64, is the key's own for `message`; False for anything that is no signature."""
    from cryptography.exceptions import InvalidSignature

    if not isinstance(signature, str):
        return False
    try:
        content = base64.b64decode(signature, validate=True)
        key.verify(content, message)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return base64.b64encode(content).decode("ascii") == signature  # base64's last digit has bits that say nothing


def _library() -> tuple[Any, Any]:
    """cryptography's modules for Ed25519 and for files of keys."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise WhetError("signing needs cryptography", where=VARIABLE, fix='pip install "whet[sign]"') from None
    return ed25519, serialization


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise WhetError("there is no such key file", where=str(path), fix=MAKE) from None
    except OSError as error:
        raise WhetError(f"cannot read the key: {error.strerror}", where=str(path), fix="check the path") from None


def _taken(path: Path) -> WhetError:
    fix = "keep that key, or choose another name: what it signed can be checked with it alone"
    return WhetError("a file has this name already, and a key is never overwritten", where=str(path), fix=fix)
