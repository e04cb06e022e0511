"""SHA256SUMS: the digest of every file of a folder, in the form that `sha256sum -c SHA256SUMS` reads."""

from __future__ import annotations

from pathlib import Path

from whet.errors import WhetError
from whet.files import sha256, write_text

NAME = "SHA256SUMS"


def write_checksums(folder: Path) -> dict[str, str]:
    """Write `folder/SHA256SUMS` over all other files in it, and return what it holds: path -> digest."""
    digests = {name: sha256(folder / name) for name in _files(folder)}
    write_text(folder / NAME, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return digests


def check(folder: Path) -> None:
    """Raises WhetError for a file that is missing, changed, or not listed."""
    path = folder / NAME
    if not path.is_file():
        raise WhetError("there is no SHA256SUMS", where=str(folder), fix="export again")
    lines = (line.partition("  ") for line in path.read_text(encoding="utf-8").splitlines())
    listed = {name: digest for digest, _, name in lines}
    present = set(_files(folder))
    for name in sorted(listed.keys() | present):
        if name not in present or name not in listed:
            what = "is missing" if name not in present else "is not listed"
        elif sha256(folder / name) != listed[name]:
            what = "was changed"
        else:
            continue
        raise WhetError(f"{name} {what}", where=str(folder), fix="copy the folder again, or export again")


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != NAME)
