"""Rows of every format become the same few kinds of example; faults say what to type."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.examples import Conversation, Preference, Text
from whet.data.faults import Faults
from whet.data.formats import Source, detect, load_examples, normalise, normalise_all
from whet.data.read.rows import Row
from whet.errors import WhetError, WhetErrors

ASKED = {"role": "user", "content": "Hi"}
ANSWERED = {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}
CHAT = [ASKED, ANSWERED]


@pytest.mark.parametrize(
    ("format", "values"),
    [
        ("messages", {"messages": CHAT}),
        ("messages", {"conversations": CHAT}),
        ("messages", {"messages": json.dumps(CHAT)}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWERED]}),
        ("messages", {"messages": [{**ASKED, "name": None}, ANSWERED]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
        ("sharegpt", {"messages": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}),
        ("prompt-completion", {"prompt": "Hi", "completion": "Hello"}),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}),
        ("alpaca", {"instruction": "Hi", "output": "Hello", "input": None}),
    ],
)
def test_every_conversational_format_gives_the_same_conversation(format: str, values: dict[str, Any]):
    assert detect(values) == format
    example = normalise(Row(values, "a.jsonl", 3), format)
    assert isinstance(example, Conversation)
    assert example.messages == CHAT
    assert example.where == "a.jsonl:3"
    assert example.id == normalise(Row({"messages": CHAT}, "b.jsonl", 9), "messages").id


def test_the_id_is_a_digest_of_the_content_that_never_changes():
    """Catches a digest that rests on key order, on the file, or on Python's own hash."""
    named = [{**ASKED, "name": "Ann", "at": 1}, ANSWERED]
    swapped = [{"at": 1, "name": "Ann", "content": "Hi", "role": "user"}, ANSWERED]
    ids = {normalise(Row({"messages": chat}, "a", 1), "messages").id for chat in (named, swapped)}
    assert len(ids) == 1
    assert Text(text="é", source="a", line=1).id == "d804508ba860f371e3f4ad571e0b760745ca1347987ba8ad41cb3eef8b4c284f"


def test_alpaca_joins_input_and_keeps_system_and_other_columns():
    values = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "customer": 7}
    example = normalise(Row(values, "a", 1), "alpaca")
    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == ["Be brief.", "Add\n\n1 2", "3"]
    assert example.extra == {"customer": 7}


def test_tool_turns_and_tool_calls_pass_through():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = [ASKED, call, {"role": "tool", "content": "3", "name": "add"}, ANSWERED]
    example = normalise(Row({"messages": chat, "tools": tools}, "a", 1), "messages")
    assert isinstance(example, Conversation)
    assert example.messages == chat
    assert example.tools == tools


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [OTHER]},
        {"prompt": [ASKED], "chosen": "Hello", "rejected": "Go away"},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, OTHER]},
        {"prompt": "Hi", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, OTHER]},
    ],
)
def test_every_spelling_of_a_preference(values: dict[str, Any]):
    assert detect(values) == "preference"
    example = normalise(Row(values, "a", 1), "preference")
    assert isinstance(example, Preference)
    assert (example.prompt, example.chosen, example.rejected) == ([ASKED], [ANSWERED], [OTHER])


def test_columns_say_which_column_plays_which_part():
    row = Row({"question": "Hi", "answer": "Hello", "prompt": "unused"}, "a", 1)
    example = normalise(row, "prompt-completion", {"prompt": "question", "completion": "answer"})
    assert isinstance(example, Conversation)
    assert example.messages == CHAT


@pytest.mark.parametrize(
    ("format", "values", "says"),
    [
        ("alpaca", {"instruction": "Hi", "outputs": "x"}, "no column 'output'; the row has instruction, outputs"),
        ("messages", {"chat": CHAT}, "no column 'messages'"),
        ("messages", {"messages": 3}, "a number where a list is wanted"),
        ("messages", {"messages": None}, "missing (null) where a list is wanted"),
        ("messages", {"messages": "[" * 100_000}, "text where a list is wanted"),
        ("messages", {"messages": CHAT, "tools": {"a": 1}}, "tools is an object where a list is wanted"),
        ("messages", {"messages": CHAT, "system": 1}, "system is a number where text is wanted"),
        ("messages", {"messages": [{"from": "human", "value": "x"}]}, "unknown role 'human'"),
        ("alpaca", {"instruction": "Hi", "input": 5, "output": "x"}, "input is a number where text is wanted"),
        ("alpaca", {"instruction": True, "output": "x"}, "instruction is a boolean where text is wanted"),
        ("prompt-completion", {"prompt": None, "completion": "x"}, "prompt is missing (null)"),
        ("preference", {"prompt": "p", "chosen": {"a": 1}, "rejected": "b"}, "chosen is an object"),
        ("preference", {"prompt": [], "chosen": "a", "rejected": "b"}, "prompt is an empty list"),
        ("preference", {"chosen": "a"}, "no column 'rejected'"),
        ("messages", {"messages": "Hi"}, "text where a list is wanted"),
        ("messages", {"messages": []}, "empty list"),
        ("messages", {"messages": ["Hi"]}, "messages[0] is text where a message is wanted"),
        ("messages", {"messages": [ASKED, {"role": "assistant", "content": " \n"}]}, "messages[1].content is empty"),
        ("messages", {"messages": [ASKED, {"role": "assistant", "content": None}]}, "missing (null)"),
        ("messages", {"messages": [ASKED, {"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ("messages", {"messages": [ASKED, {"content": "x"}]}, "no 'role'"),
        ("messages", {"messages": [ASKED]}, "no assistant turn, only user"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        ("text", {"text": 5}, "text is a number"),
        ("text", {"text": "\ud800"}, "surrogate"),
        ("prompt-completion", {"prompt": "Hi", "completion": ""}, "completion is empty"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no column 'prompt'"),
        ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "the same"),
        ("preference", {"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "rejected must hold the answer"),
        ("preference", {"chosen": [ANSWERED], "rejected": [OTHER]}, "no column 'prompt'"),
        ("nonsense", {"text": "x"}, "no format is called 'nonsense'"),
    ],
)
def test_faults_say_what_is_wrong_with_the_row(format: str, values: dict[str, Any], says: str):
    with pytest.raises(WhetError) as caught:
        normalise(Row(values, "a.jsonl", 4), format)
    assert says in caught.value.what
    assert caught.value.fix
    assert caught.value.where == ("format" if format == "nonsense" else "a.jsonl:4")


def test_the_fix_names_the_nearest_column_part_or_format():
    with pytest.raises(WhetError, match=r"columns: \{output: outputs\}"):
        normalise(Row({"instruction": "Hi", "outputs": "x"}, "a", 1), "alpaca")
    with pytest.raises(WhetError, match="use alpaca"):
        normalise(Row({}, "a", 1), "alpacca")
    with pytest.raises(WhetError, match="use completion"):
        normalise(Row({}, "a", 1), "prompt-completion", {"completions": "x"})


def test_an_unknown_shape_lists_the_columns():
    with pytest.raises(WhetError, match="question, reply"):
        detect({"question": "Hi", "reply": "Hello"})


def test_faults_of_all_sources_come_at_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": ""}\noops\n{"txt": "x"}\n')
    (tmp_path / "b.csv").write_text("prompt,completion\nHi,\n")
    sources = [Source("a.jsonl"), Source("b.csv"), Source("c.parquet"), Source("a.jsonl", format="txt")]
    with pytest.raises(WhetErrors) as caught:
        load_examples(sources, base=tmp_path)
    assert [error.where for error in caught.value.errors] == [
        "a.jsonl:2",
        "a.jsonl:3",
        "a.jsonl:4",
        "b.csv:2",
        "c.parquet",
        "format",
    ]


def test_sources_are_loaded_in_order(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.csv").write_text("q,a\nHi,Hello\n")
    pair = Source("b.csv", "prompt-completion", {"prompt": "q", "completion": "a"})
    assert [example.where for example in load_examples([pair, Source("a.jsonl")], base=tmp_path)] == [
        "b.csv:2",
        "a.jsonl:1",
        "a.jsonl:2",
    ]


@given(prompt=st.text(min_size=1), answer=st.text(min_size=1))
def test_content_is_never_altered(prompt: str, answer: str):
    row = Row({"prompt": prompt, "completion": answer}, "a", 1)
    if not (prompt.strip() and answer.strip()):
        with pytest.raises(WhetError, match="is empty"):
            normalise(row, "prompt-completion")
        return
    example = normalise(row, "prompt-completion")
    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == [prompt, answer]


def test_text_is_detected_and_kept(tmp_path: Path):
    assert detect({"text": "a", "lang": "en"}) == "text"
    (tmp_path / "a.md").write_text("# Title\n")
    (example,) = load_examples([Source("*.md")], base=tmp_path)
    assert isinstance(example, Text)
    assert (example.text, example.where) == ("# Title\n", "a.md:1")


def test_sharegpt_roles_and_system_column():
    turns = [
        ("system", "S"),
        ("human", "Q"),
        ("function_call", "F"),
        ("observation", "O"),
        ("function", "R"),
        ("gpt", "A"),
    ]
    row = Row({"conversations": [{"from": role, "value": value} for role, value in turns]}, "a", 1)
    example = normalise(row, "sharegpt")
    assert isinstance(example, Conversation)
    assert [m["role"] for m in example.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [m["content"] for m in example.messages] == ["S", "Q", "F", "O", "R", "A"]
    with_column = normalise(Row({"conversations": CHAT, "system": "Be brief."}, "a", 1), "sharegpt")
    assert isinstance(with_column, Conversation)
    assert with_column.messages == [{"role": "system", "content": "Be brief."}, *CHAT]


def test_tools_may_be_json_text_and_none_of_them_is_none():
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given_tools, expected in ((json.dumps(tools), tools), ([], None), (None, None), ("", None)):
        example = normalise(Row({"messages": CHAT, "tools": given_tools}, "a", 1), "messages")
        assert isinstance(example, Conversation)
        assert example.tools == expected


def test_preferences_that_differ_in_the_last_of_several_turns():
    """The turns that chosen and rejected share, answers too, are the prompt."""
    shared = [{"role": "system", "content": "S"}, ASKED, ANSWERED, {"role": "user", "content": "And?"}]
    values = {"chosen": [*shared, ANSWERED], "rejected": [*shared, OTHER]}
    example = normalise(Row(values, "a", 1), "preference")
    assert isinstance(example, Preference)
    assert (example.prompt, example.chosen, example.rejected) == (shared, [ANSWERED], [OTHER])


def test_columns_are_renamed_before_the_format_is_told():
    faults = Faults()
    rows = [Row({"q": "Hi", "a": "Hello", "customer": 7}, "a", 1)]
    (example,) = normalise_all(rows, None, {"prompt": "q", "completion": "a"}, faults=faults)
    assert isinstance(example, Conversation)
    assert (example.messages, example.extra, faults.errors) == (CHAT, {"customer": 7}, [])


def test_a_mistyped_column_is_named_with_the_nearest():
    """Catches advice that compares the part's name, not the name that was typed, with the row's columns."""
    with pytest.raises(WhetError, match=r"no column 'reponse'") as caught:
        normalise(Row({"instruction": "Hi", "response": "x"}, "a", 1), "alpaca", {"output": "reponse"})
    assert caught.value.fix == "map it, as: columns: {output: response}"
    with pytest.raises(WhetError, match=r"no column 'mesages'") as caught:
        normalise(Row({"messages_v2": CHAT}, "a", 1), "messages", {"messages": "mesages"})
    assert caught.value.fix == "map it, as: columns: {messages: messages_v2}"


def test_one_column_cannot_play_two_parts():
    with pytest.raises(WhetError, match="two parts name the column 'q'"):
        normalise(Row({"q": "Hi"}, "a", 1), "prompt-completion", {"prompt": "q", "completion": "q"})


@pytest.mark.parametrize(("bad", "shown"), [(19, 19), (20, 21), (60, 21)])
def test_up_to_twenty_faults_come_at_once_across_files(tmp_path: Path, bad: int, shown: int):
    for name, count in (("a", bad // 2), ("b", bad - bad // 2)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "ok"}\n' + '{"text": ""}\n' * count)
    with pytest.raises(WhetErrors) as caught:
        load_examples([Source("a.jsonl"), Source("b.jsonl")], base=tmp_path)
    assert len(caught.value.errors) == shown
    assert ("may be more" in str(caught.value)) == (bad >= 20)
    assert [e.where for e in caught.value.errors[:2]] == ["a.jsonl:2", "a.jsonl:3"]


PLAIN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(str.strip)
ROWS = st.one_of(
    st.fixed_dictionaries({"text": PLAIN}),
    st.fixed_dictionaries({"prompt": PLAIN, "completion": PLAIN}, optional={"system": PLAIN}),
    st.fixed_dictionaries({"prompt": PLAIN, "chosen": PLAIN.map("+".__add__), "rejected": PLAIN.map("-".__add__)}),
)


@settings(deadline=None)
@given(rows=st.lists(ROWS, min_size=2, max_size=6), order=st.randoms(use_true_random=False), extra=PLAIN)
def test_ids_are_equal_where_and_only_where_the_content_is(rows: list[dict[str, str]], order: Any, extra: str):
    """Whatever the file, the line, the order of columns and rows, and the columns that are no content."""
    ids = {json.dumps(row, sort_keys=True): normalise(Row(row, "a", i), detect(row)).id for i, row in enumerate(rows)}
    assert len(set(ids.values())) == len(ids)
    order.shuffle(rows)
    for line, row in enumerate(rows):
        moved = {"customer": extra, **dict(reversed(row.items()))}
        assert normalise(Row(moved, "b", line), detect(moved)).id == ids[json.dumps(row, sort_keys=True)]


@pytest.mark.parametrize(
    "values",
    [
        {"text": "ab"},
        {"prompt": "ab", "completion": "cd", "system": "ef"},
        {"instruction": "ab", "input": "cd", "output": "ef", "system": "gh"},
        {"prompt": "ab", "chosen": "cd", "rejected": "ef", "system": "gh"},
        {"messages": CHAT, "tools": [{"name": "add"}]},
    ],
)
def test_every_part_of_the_content_counts_to_its_last_character(values: dict[str, Any]):
    """Catches a digest that leaves a part out, or cuts it."""
    changed: list[dict[str, Any]] = [values]
    for part, value in values.items():
        other = value + "!" if isinstance(value, str) else [*value, {"role": "user", "content": "!"}]
        changed.append({**values, part: other})
    assert len({normalise(Row(row, "a", 1), detect(row)).id for row in changed}) == len(changed)


def test_a_date_in_a_message_has_an_id():
    """Catches a TypeError for what Parquet holds and JSON does not."""
    early, late = (
        normalise(Row({"messages": [{**ASKED, "at": datetime.date(2020, 1, day)}, ANSWERED]}, "a", 1), "messages").id
        for day in (1, 2)
    )
    assert early != late
