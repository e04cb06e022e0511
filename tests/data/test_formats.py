"""Rows of every format become the same few kinds of example; faults say what to type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.data.examples import Conversation, Preference, Text
from whet.data.formats import Source, detect, load_examples, normalise
from whet.data.read import Row
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
    swapped = [{"content": "Hi", "role": "user"}, ANSWERED]
    ids = {normalise(Row({"messages": chat}, "a", 1), "messages").id for chat in (CHAT, swapped)}
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
