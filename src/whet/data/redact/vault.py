"""Originals, sealed: what a redacted text can be brought back with, by whoever has the key.

    b"whet vault 1\n"  +  AES-256-SIV of the originals as JSON; the first line is authenticated with them

AES-SIV (RFC 5297) is deterministic: the same originals under the same key give the same bytes, so a run that goes on
after a stop writes the vault it would have written. What that shows is that two vaults are equal, and nothing else. A
vault is opened whole or not at all. Each chunk of rows seals its own; `unseal_files` brings many together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from whet.data.redact.keys import derive
from whet.data.redact.marks import MARK
from whet.errors import WhetError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESSIV

NAME = b"whet vault "
HEADER = NAME + b"1\n"
PURPOSE = "whet vault 1"


def seal(originals: Mapping[str, str], key: bytes) -> bytes:
    """A vault of {replacement: original}."""
    text = json.dumps(dict(sorted(originals.items())), separators=(",", ":"))
    return HEADER + _cipher(key).encrypt(text.encode("ascii"), [HEADER])


def unseal(data: bytes, key: bytes, *, where: str = "vault") -> dict[str, str]:
    """{replacement: original} of a vault. Raises WhetError for another key, a changed byte, and what is no vault."""
    header, body = data[: len(HEADER)], data[len(HEADER) :]
    if header != HEADER:
        ours = header.startswith(NAME)
        what = "this vault is of another version than 1" if ours else "this is no vault"
        raise WhetError(what, where=where, fix="open it with the whet that wrote it" if ours else "check the path")
    cipher = _cipher(key)
    from cryptography.exceptions import InvalidTag

    try:
        text = cipher.decrypt(body, [HEADER])
    except (InvalidTag, ValueError):
        fix = "use the key that it was written with; if this is that key, the file was changed"
        raise WhetError("the vault does not open with this key", where=where, fix=fix) from None
    originals: dict[str, str] = json.loads(text)
    return originals


def unseal_files(paths: Iterable[Path], key: bytes) -> dict[str, str]:
    """All originals of many vaults. Raises WhetError where two of them give one replacement different originals."""
    together: dict[str, str] = {}
    for path in paths:
        for replacement, original in unseal(path.read_bytes(), key, where=str(path)).items():
            if together.setdefault(replacement, original) != original:
                fix = "restore with the vaults of one data set at a time"
                raise WhetError("a replacement stands for two originals", where=str(path), fix=fix)
    return together


def restore(texts: Sequence[str], originals: Mapping[str, str]) -> list[str]:
    """The texts with every marked replacement turned back; replacements that `originals` lacks stay."""
    by_mark: dict[str, list[tuple[str, str]]] = {}  # one value may stand as a placeholder and as its substitute
    for new, old in originals.items():
        if match := _last_mark(new):
            by_mark.setdefault(match[1], []).append((new, old))
    return [_restored(text, by_mark) for text in texts]


def _restored(text: str, by_mark: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    parts, done = [], 0
    for match in MARK.finditer(text):
        for new, old in by_mark.get(match[1], ()):
            start = match.end() - len(new)
            if start >= done and text.startswith(new, start):
                parts += [text[done:start], old]
                done = match.end()
                break
    return "".join([*parts, text[done:]])


def _last_mark(replacement: str) -> re.Match[str] | None:
    """The mark that a replacement ends in."""
    last = list(MARK.finditer(replacement))[-1:]
    return last[0] if last and last[0].end() == len(replacement) else None


def _cipher(key: bytes) -> AESSIV:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV
    except ImportError:
        fix = 'pip install "whet[redact]"'
        raise WhetError("a vault needs the package cryptography", where="redact", fix=fix) from None
    return AESSIV(derive(key, PURPOSE, 64))
