"""Which checkpoint is gone on from: the latest that is as it was when it was sealed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from whet.train.checkpoint import SEAL, is_whole, newest_whole, seal


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "sub").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(step % 200)) * 10)
    (path / "sub" / "state").write_text(str(step))
    if sealed:
        seal(path)
    return path


def cut(path: Path) -> None:
    (path / "weights").write_bytes((path / "weights").read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray((path / "weights").read_bytes())
    data[3] ^= 1
    (path / "weights").write_bytes(data)


def lose(path: Path) -> None:
    (path / "sub" / "state").unlink()


def empty_seal(path: Path) -> None:
    (path / SEAL).write_text("")


def unseal(path: Path) -> None:
    (path / SEAL).unlink()


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 5)
    assert is_whole(path)
    seal(path)  # again, as after a resumption that saves at the same step
    assert is_whole(path)


@pytest.mark.parametrize("damage", [cut, flip, lose, empty_seal, unseal])
def test_a_damaged_one_is_passed_over_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    """Catches a trainer that keeps the damaged one as the latest, and deletes the whole one it went on from."""
    good, bad = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    damage(bad)  # type: ignore[operator]
    assert not is_whole(bad)
    with caplog.at_level(logging.WARNING, logger="whet"):
        assert newest_whole(tmp_path) == good
    assert "checkpoint-10 is incomplete or damaged" in caplog.text
    assert not bad.exists()


def test_the_latest_is_by_number(tmp_path: Path) -> None:
    """Catches the order of names, where 9 comes after 10."""
    _, later = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest_whole(tmp_path) == later


def test_an_older_damaged_one_is_left_alone(tmp_path: Path) -> None:
    old, new = checkpoint(tmp_path, 1, sealed=False), checkpoint(tmp_path, 2)
    assert newest_whole(tmp_path) == new
    assert old.exists()


def test_none_is_whole(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None
    checkpoint(tmp_path, 1, sealed=False)
    assert newest_whole(tmp_path) is None
