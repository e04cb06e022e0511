"""The secret key behind pseudonyms and the vault: made once, read from a private file or an environment variable.

A key file is two lines: a header that says what the file is, and 32 random bytes in base64. Each use takes a key of its
own out of the secret (HKDF), so that what the pseudonyms show says nothing about the vault, and the other way round.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from whet.errors import WhetError
from whet.files import refused_when_full

HEADER = "# whet redaction key, version 1. Whoever has it can undo pseudonyms and open vaults."
KEY_BYTES = 32
MAKE = "make a key with `whet data key redaction.key`"


def make_key(path: str | Path) -> None:
    """Write a new key to `path`, readable by its owner alone. Raises WhetError when the file is there already."""
    text = f"{HEADER}\n{base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode('ascii')}\n"
    with refused_when_full(Path(path)):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fix = "keep that key, or choose another name: without its key a vault stays shut"
            raise WhetError(
                "a file has this name already, and a key is never overwritten", where=str(path), fix=fix
            ) from None
        except FileNotFoundError:
            raise WhetError("there is no such folder", where=str(Path(path).parent), fix="make it first") from None
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def load_key(source: str | Path) -> bytes:
    """The key in a file, or in the environment variable NAME for `env:NAME`; at least 32 bytes.

    Raises WhetError when there is none, when others may read the file, and when it is no key. No message shows it.
    """
    if isinstance(source, str) and source.startswith("env:"):
        name = source.removeprefix("env:")
        if not (text := os.environ.get(name, "")):
            fix = f"set {name} to the base64 line of a key file; {MAKE}"
            raise WhetError("this environment variable is not set", where=source, fix=fix)
        return _decoded(text, source)
    return _decoded(_private_text(Path(source)), str(source))


def derive(key: bytes, purpose: str, length: int = 32) -> bytes:
    """A key of `length` bytes for one purpose: HKDF-SHA256 without a salt (RFC 5869)."""
    if len(key) < KEY_BYTES:
        raise WhetError(f"a key of {len(key)} bytes is too short: it has at least {KEY_BYTES}", where="key", fix=MAKE)
    extracted = hmac.digest(bytes(hashlib.sha256().digest_size), key, "sha256")
    output, block, count = b"", b"", 0
    while len(output) < length:
        count += 1
        block = hmac.digest(extracted, block + purpose.encode("utf-8") + bytes([count]), "sha256")
        output += block
    return output[:length]


def _private_text(path: Path) -> str:
    """What the file says, once it is known that only its owner may read it."""
    try:
        with open(path, encoding="ascii") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
                fix = f"chmod 600 {path}"
                raise WhetError(f"others may read this key (its mode is {mode:03o})", where=str(path), fix=fix)
            return file.read()
    except FileNotFoundError:
        raise WhetError("there is no such key file", where=str(path), fix=MAKE) from None
    except IsADirectoryError:
        raise WhetError("this is a folder", where=str(path), fix="name the key file in it") from None
    except PermissionError:
        raise WhetError("not allowed to read this file", where=str(path), fix="check its owner") from None
    except UnicodeDecodeError:
        raise _malformed(str(path)) from None


def _decoded(text: str, where: str) -> bytes:
    """The bytes of a key's text; the header may be missing, as in an environment variable."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) != 1:
        raise _malformed(where)
    try:
        key = base64.b64decode(lines[0], validate=True)
    except (binascii.Error, ValueError):
        raise _malformed(where) from None
    if len(key) < KEY_BYTES:
        raise WhetError(f"this key has {len(key)} bytes, of at least {KEY_BYTES}", where=where, fix=MAKE)
    return key


def _malformed(where: str) -> WhetError:
    # "from None" at every raise: the decoder's own message would quote the key
    return WhetError(
        "this is no key: one line of base64 is wanted, after lines that start with #", where=where, fix=MAKE
    )
