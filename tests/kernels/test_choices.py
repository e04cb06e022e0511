"""The file of what was measured: kept apart by kind, and as good as none when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from whet.kernels import _choices


def test_choices_are_kept_for_their_card_and_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one card's choices taken for another's, and a second that replaces the first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert _choices.kept("card 1") == {}
    _choices.keep("card 1", "a", 3)
    _choices.keep("card 1", "b", 0)
    _choices.keep("card 2", "a", 1)
    assert _choices.kept("card 1") == {"a": 3, "b": 0}
    assert _choices.kept("card 2") == {"a": 1}
    assert [path.name for path in (tmp_path / "new" / "whet").iterdir()] == [_choices.NAME]


@pytest.mark.parametrize("content", ["", "[1]", '{"card": 5}', '{"card": {"a": -1, "b": "2", "c": true}}', "\x00"])
def test_a_damaged_file_of_choices_is_as_good_as_none(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _choices.path().parent.mkdir()
    _choices.path().write_text(content)
    assert _choices.kept("card") == {}
    _choices.keep("card", "a", 2)
    assert _choices.kept("card") == {"a": 2}


def test_choices_that_can_t_be_kept_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level("INFO"):
        _choices.keep("card", "a", 2)
    assert "not kept" in caplog.text
    assert _choices.kept("card") == {}
