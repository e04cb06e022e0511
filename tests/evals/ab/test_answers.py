"""Reading answers and pairing them by id."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.errors import WhetError
from whet.evals import results
from whet.evals.ab.answers import pair, plain, read_named, read_systems

FIELDS = st.sampled_from(["id", "prompt", "answer", "reference", "base", "tuned", "task", "model", "other"])


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(id: Any = "1", prompt: str = "p", answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"id": id, "prompt": prompt, "answer": answer, **more}


def result(path: Path, model: str, answer: str, digest: str = "d") -> Path:
    items = (results.Item("1", "p", "ref", answer, 1.0), results.Item("2", "q", None, answer, None))
    results.TaskResult("task", digest, model, items, 1.0).save(path)
    return path


def test_items_are_paired_by_id_and_not_by_line(tmp_path: Path) -> None:
    """Catches pairing by position, which compares answers to different questions."""
    a = write(tmp_path / "a.jsonl", line("1", "p", "a1"), line(2, "q", "a2", reference="r"))
    b = write(tmp_path / "b.jsonl", line("2", "q", "b2"), line("1", "p", "b1"))
    items = pair([*read_systems(a), *read_systems(b)])
    assert [(item.id, item.answers) for item in items] == [("1", ("a1", "b1")), ("2", ("a2", "b2"))]
    assert items[1].reference == "r"


def test_results_of_a_task_are_read_and_named_after_the_model(tmp_path: Path) -> None:
    systems = [*read_systems(result(tmp_path / "a", "base", "x")), *read_systems(result(tmp_path / "b", "tuned", "y"))]
    assert [system.name for system in systems] == ["base", "tuned"]
    assert [item.answers for item in pair(systems)] == [("x", "y"), ("x", "y")]


def test_results_of_another_task_are_refused(tmp_path: Path) -> None:
    """Catches a comparison of answers to two versions of a task."""
    a, b = result(tmp_path / "a", "base", "x"), result(tmp_path / "b", "tuned", "y", digest="other")
    with pytest.raises(WhetError, match="another task"):
        pair([*read_systems(a), *read_systems(b)])


def test_a_runs_answers_are_two_systems(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.jsonl", {"prompt": "p", "reference": "r", "base": "x", "tuned": "y"})
    assert [(system.name, system.answers["1"].text) for system in read_systems(path)] == [("base", "x"), ("tuned", "y")]


def test_a_file_can_be_given_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line())
    assert [system.name for system in read_named(f"base={path}")] == ["base"]
    odd = write(tmp_path / "x=y.jsonl", line())
    assert [system.name for system in read_named(str(odd))] == ["x=y"]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([], "no answers"),
        ([{"prompt": "p", "answer": "a"}], "no id"),
        ([line(True)], "no id"),
        ([line(""), line("2")], "no id"),
        ([line("1"), line(1)], "twice"),
        ([{"id": "1", "answer": "a"}], '"prompt" is missing'),
        ([line(answer=None)], '"answer" is missing'),
        ([line(), ["a list"]], "not a JSON object"),
        ([line(reference=3)], '"reference" is missing or not a text'),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, lines: list[Any], what: str) -> None:
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(WhetError, match=what) as refused:
        read_systems(path)
    assert str(path) in str(refused.value.where)


@pytest.mark.parametrize("content", [b'{"id": "1", "prompt"', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(WhetError):
        read_systems(tmp_path / "a.jsonl")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WhetError, match="cannot read"):
        read_systems(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ([line("1"), line("2")], [line("1")], "1 items of the other files are not here: '2'"),
        ([line("1")], [line("2")], "not here"),
        ([line("1", "p")], [line("1", "other")], "another prompt"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, first: list[Any], second: list[Any], what: str) -> None:
    """Catches items dropped without a word, and answers compared that are to different prompts."""
    a, b = write(tmp_path / "a.jsonl", *first), write(tmp_path / "b.jsonl", *second)
    with pytest.raises(WhetError, match=what):
        pair([*read_systems(a), *read_systems(b)])


def test_only_shared_items_on_request(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", line("1"), line("2"))
    b = write(tmp_path / "b.jsonl", line("3"), line("2"))
    systems = [*read_systems(a), *read_systems(b)]
    assert [item.id for item in pair(systems, shared=True)] == ["2"]
    with pytest.raises(WhetError, match="no id is in all files"):
        pair([systems[0], *read_systems(write(tmp_path / "c.jsonl", line("9")))], shared=True)


def test_one_system_or_two_of_a_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", line())
    with pytest.raises(WhetError, match="nothing to compare"):
        pair(read_systems(path))
    with pytest.raises(WhetError, match="two systems are called 'a'"):
        pair([*read_systems(path), *read_systems(path)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(FIELDS, inside, max_size=6),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=6) | JSON, max_size=4))
def test_any_json_is_read_or_refused(lines: list[Any]) -> None:
    """Catches a traceback in the place of a message: whatever the lines hold, the answer is systems or a WhetError."""
    with TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", *lines)
        try:
            systems = read_systems(path)
        except WhetError:
            return
        for system in systems:
            for answer in system.answers.values():
                (answer.prompt + answer.text + (answer.reference or "")).encode()


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_every_text_can_be_sent(text: str) -> None:
    """Catches half a surrogate pair, which JSON can hold and UTF-8 cannot: the page of that item would be an error."""
    assert isinstance(plain(text).encode(), bytes)
    whole = text.encode("utf-8", "ignore").decode()
    if whole == text:
        assert plain(text) == text.strip()
