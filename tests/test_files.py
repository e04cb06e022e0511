"""Files and folders are there whole or not at all, and a disk's refusals are told as the user's to mend."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from whet.errors import WhetError
from whet.files import refused_when_full, sha256, staged_folder, write_text


def test_write_text_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "zwölf\n")
    assert path.read_text(encoding="utf-8") == "zwölf\n"
    assert list(tmp_path.iterdir()) == [path]


def test_write_text_that_fails_leaves_the_old_text(tmp_path: Path) -> None:
    """Catches a file that is cut short, or a .partial beside it: a lone surrogate can't be written as UTF-8."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 10_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "stage"
    with staged_folder(final) as staged:
        (staged / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_that_fails_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "stage") as staged:
        (staged / "none" / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_not_taken_over(tmp_path: Path) -> None:
    """Catches a file of an earlier attempt that ends up in a finished folder."""
    (tmp_path / ".stage.partial").mkdir()
    (tmp_path / ".stage.partial" / "old").write_text("0")
    with staged_folder(tmp_path / "stage") as staged:
        (staged / "a").write_text("1")
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["a"]


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path: Path) -> None:
    final = tmp_path / "stage"
    (final / "sub").mkdir(parents=True)
    (final / "sub" / "old").write_text("0")
    (final / "notes").write_text("mine")
    with staged_folder(final) as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "new").write_text("1")
    assert sorted(path.name for path in final.rglob("*")) == ["new", "notes", "sub"]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "stage").write_text("a file")
    with pytest.raises(WhetError, match="a file has this name"), staged_folder(tmp_path / "stage"):
        pass
    assert (tmp_path / "stage").read_text() == "a file"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the disk (your quota is used up)"),
        (OSError(errno.EFBIG, "File too large"), "no space left on the disk (the limit on a file's size)"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "not allowed to write here"),
        (OSError(errno.EROFS, "Read-only file system"), "not allowed to write here"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "a file stands where a folder is to be"),
    ],
)
def test_refusals_of_the_disk(error: Exception, what: str) -> None:
    with pytest.raises(WhetError) as caught, refused_when_full(Path("runs/a")):
        raise error
    assert what in caught.value.what
    assert caught.value.fix
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyError("x"), WhetError("mine")])
def test_other_errors_pass(error: Exception) -> None:
    """Catches a bug that is told as the user's fault, and a message that is buried under another."""
    with pytest.raises(type(error)) as caught, refused_when_full(Path("runs/a")):
        raise error
    assert caught.value is error


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(3 << 20) + b"x")
    assert sha256(tmp_path / "a") == hashlib.sha256(bytes(3 << 20) + b"x").hexdigest()
