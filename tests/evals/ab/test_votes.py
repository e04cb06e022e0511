"""The votes' file: nothing confirmed is lost, nothing half written stays, nothing is read that is not sure."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.evals.ab.studies import make_study, standing, vote
from whet.errors import WhetError
from whet.evals.ab.study import Study, load
from whet.evals.ab.votes import Closed, Log, StudyClosed, Undone, hashed, now, read


@pytest.fixture
def study(tmp_path: Path) -> Study:
    make_study(tmp_path)
    return load(tmp_path / "study")


@pytest.fixture
def path(tmp_path: Path, study: Study) -> Path:
    return tmp_path / "study" / "votes.jsonl"


def test_a_later_vote_replaces_and_an_undo_takes_back(path: Path, study: Study) -> None:
    first, second, *_ = study.seats("ada")
    with Log(path, study) as log:
        vote(log, "ada", first, "left")
        vote(log, "ada", second, "tie")
        vote(log, "ada", first, "right", "on second thought")
        assert list(log.state.votes["ada"]) == [second.key, first.key], "the latest is last: undo begins there"
        log.append(Undone(time=now(), grader="ada", comparison=second.key))
        log.append(Undone(time=now(), grader="ada", comparison=second.key))
    state = read(path, study)
    assert standing(state) == {"ada": {first.key: "right"}, "grace": {}}
    assert state.votes["ada"][first.key].comment == "on second thought"


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["ada", "grace"]), st.integers(0, 5), st.sampled_from(["left", "tie", "skip", None]))
    )
)
def test_a_file_read_again_says_what_the_server_knew(
    path: Path, study: Study, acts: list[tuple[str, int, str | None]]
) -> None:
    with Log(path, study) as log:
        for grader, number, choice in acts:
            seat = study.seats(grader)[number]
            if choice is None:
                log.append(Undone(time=now(), grader=grader, comparison=seat.key))
            else:
                vote(log, grader, seat, choice)  # type: ignore[arg-type]
        known = log.state
    assert read(path, study) == known


def test_a_line_cut_off_anywhere_is_dropped_and_the_next_vote_is_whole(path: Path, study: Study) -> None:
    """Catches a vote glued to the rest of a torn one, which damages both."""
    first, second, *_ = study.seats("ada")
    with Log(path, study) as log:
        vote(log, "ada", first, "left")
        sure = path.stat().st_size
        vote(log, "ada", second, "right", "a comment, ünïcode too")
    whole = path.read_bytes()
    for cut in range(sure, len(whole)):
        path.write_bytes(whole[:cut])
        assert standing(read(path, study))["ada"] == {first.key: "left"}
        with Log(path, study) as log:
            vote(log, "ada", second, "tie")
        assert standing(read(path, study))["ada"] == {first.key: "left", second.key: "tie"}


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow past `size`, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_full_disk_refuses_the_vote_and_leaves_no_half_line(path: Path, study: Study, room: int) -> None:
    """Catches half a line left behind, which would damage the file once there is space again."""
    first, second, *_ = study.seats("ada")
    with Log(path, study) as log:
        vote(log, "ada", first, "left")
        before = path.read_bytes()
        with files_at_most(len(before) + room), pytest.raises(WhetError, match="no space left"):
            vote(log, "ada", second, "right")
        assert path.read_bytes() == before
        assert second.key not in log.state.votes["ada"]
        vote(log, "ada", second, "tie")
    assert standing(read(path, study))["ada"] == {first.key: "left", second.key: "tie"}


@pytest.mark.parametrize("how", ["flip", "remove", "blank", "unknown", "stranger"])
def test_damage_is_refused_with_its_line(path: Path, study: Study, how: str) -> None:
    """Catches a damaged line that is passed over: a vote would be lost without a word."""
    with Log(path, study) as log:
        for seat in study.seats("ada"):
            vote(log, "ada", seat, "left")
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "flip": [*lines[:6], lines[6].replace(b'"left"', b'"lexft"'), *lines[7:]],
        "remove": lines[1:],
        "blank": [*lines[:6], b"\n", *lines[6:]],
        "unknown": [*lines[:6], lines[6].replace(b"/0-1", b"/0-7"), *lines[7:]],
        "stranger": [*lines[:6], lines[6].replace(b'"ada"', b'"eve"'), *lines[7:]],
    }[how]
    path.write_bytes(b"".join(damaged))
    for open_it in (read, Log):
        with pytest.raises(WhetError) as refused:
            open_it(path, study)
        assert str(refused.value.where) == f"{path}:{1 if how == 'remove' else 7}"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_line_is_read_or_refused(path: Path, study: Study, data: st.DataObject) -> None:
    """Catches a traceback in the place of a message, and a file that cannot be opened for no stated reason."""
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    for changed in (whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + 1 :], whole[:at] + whole[at:][::-1]):
        copy = path.with_name("copy.jsonl")
        copy.write_bytes(changed)
        with contextlib.suppress(WhetError):
            assert read(copy, study).votes.keys() == set(read(copy, study).graders)


@pytest.mark.parametrize("content", [None, b"", b'{"time": "2026'])
def test_missing_or_emptied_votes_are_refused(path: Path, study: Study, content: bytes | None) -> None:
    """Catches a server that begins anew over votes that went missing."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for open_it in (read, Log):
        with pytest.raises(WhetError, match=r"not here|empty"):
            open_it(path, study)


def test_votes_of_another_study_are_refused(tmp_path: Path, path: Path, study: Study) -> None:
    (tmp_path / "other").mkdir()
    make_study(tmp_path / "other")
    with pytest.raises(WhetError, match="of another study"):
        read(path, load(tmp_path / "other" / "study"))


def test_one_process_at_a_time(path: Path, study: Study) -> None:
    """Catches two servers that write into each other's lines."""
    with Log(path, study), pytest.raises(WhetError, match="another whet ab has the study open"):
        Log(path, study)
    Log(path, study).close()


def test_after_the_end_no_vote_is_taken_and_the_owner_can_still_get_a_link(path: Path, study: Study) -> None:
    seat = study.seats("ada")[0]
    with Log(path, study) as log:
        log.append(Closed(time="2026-01-01T00:00:00+00:00"))
        log.append(Closed(time=now()))
        with pytest.raises(StudyClosed):
            vote(log, "ada", seat, "left")
        log.add_link("owner", "owner")
    assert read(path, study).closed == "2026-01-01T00:00:00+00:00"


def test_tokens_are_kept_as_hashes_and_a_new_link_ends_the_old(path: Path, study: Study) -> None:
    with Log(path, study) as log:
        old = log.add_link("grader", "ada")
        new = log.add_link("grader", " ada  ")
        assert log.state.who(new) == ("grader", "ada")
        assert log.state.who(old) is None
        assert log.state.who(hashed(new)) is None, "what the file holds opens nothing"
        assert log.state.graders == ("ada", "grace")
    assert new not in path.read_text()


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\x00b", "\u202eada"])
def test_names_that_cannot_be_shown_are_refused(path: Path, study: Study, name: str) -> None:
    with Log(path, study) as log, pytest.raises(WhetError, match="will not do"):
        log.add_link("grader", name)
