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

FULL: dict[int | None, str] = {
    errno.ENOSPC: "it is full",
    errno.EDQUOT: "your quota is used up",
    errno.EFBIG: "the limit on a file's size",
}
FULL_SIGNS = ("No space left on device", "Disk quota exceeded", "File too large", "file write failed")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with refused_when_full(path):
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` in one step. Several processes may write one at a time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    """Turn the operating system's refusals to write (no space, not allowed) into an error that names the place."""
    try:
        yield
    except WhetError:
        raise
    except Exception as error:
        if (refusal := _refusal(error, path)) is None:
            raise
        raise refusal from error


def _refusal(error: Exception, path: Path) -> WhetError | None:
    code = error.errno if isinstance(error, OSError) else None
    # safetensors, tokenizers and torch report a disk that is full in errors of their own
    if code in FULL or any(sign in str(error) for sign in FULL_SIGNS):
        fix = "free some space or write elsewhere, then run again"
        return WhetError(f"no space left on the disk ({FULL.get(code, error)})", where=str(path), fix=fix)
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WhetError("not allowed to write here", where=str(path), fix="write to a folder you own")
    if code in (errno.ENOTDIR, errno.EEXIST):
        name = getattr(error, "filename", None) or path
        return WhetError("a file stands where a folder is to be", where=str(name), fix="give the name of a folder")
    return None


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
