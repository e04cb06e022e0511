"""Writing files and folders so that a name either holds the whole thing or does not exist."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from whet.errors import WhetError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with refused_when_full(path):
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` to write into; on success its files move to `final`, on failure it is removed.

    Files that `final` holds under other names stay.
    """
    final = final.absolute()
    if final.is_file():
        raise WhetError("a file has this name already", where=str(final), fix="give the name of a folder")
    staged = final.with_name(f".{final.name}.partial")
    with refused_when_full(final):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            yield staged
            if not final.exists():
                staged.rename(final)
            else:
                for item in sorted(staged.iterdir()):
                    target = final / item.name
                    if target.is_dir():
                        shutil.rmtree(target)
                    os.replace(item, target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def refused_when_full(path: Path) -> Iterator[None]:
    """Turn "no space left" and "not allowed" from the operating system into an error that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WhetError(
                "no space left on the disk", where=str(path), fix="free some space or write elsewhere, then run again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise WhetError("not allowed to write here", where=str(path), fix="write to a folder you own") from error
        raise
    except Exception as error:
        # safetensors reports a full disk in an error of its own
        if "No space left on device" in str(error):
            raise WhetError(
                "no space left on the disk", where=str(path), fix="free some space or write elsewhere, then run again"
            ) from error
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
