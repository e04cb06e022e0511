"""Calls of tools, read out of the forms that families of models write."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whet.serve.tool_calls import Call, ToolText

HERMES = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
F1, G = Call("f", '{"x": 1}'), Call("g", "{}")
UNKNOWN = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
NO_OBJECT = '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'


def read(text: str, *, size: int | None = None, names: tuple[str, ...] = ("f", "g")) -> tuple[str, list[Call]]:
    """The text and the calls, given `size` characters at a time."""
    tools, shown, calls = ToolText(names), "", list[Call]()
    step = size or max(1, len(text))
    for start in range(0, len(text), step):
        more, found = tools.feed(text[start : start + step])
        shown, calls = shown + more, calls + found
    more, found = tools.finish()
    return shown + more, calls + found


@pytest.mark.parametrize("size", [1, 2, 7, None])
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (HERMES, "", [F1]),
        (f"Let me see.\n{HERMES}\n{HERMES}", "Let me see.\n", [F1, F1]),
        (f"{HERMES}\nDone.", "Done.", [F1]),
        (HERMES.removesuffix("\n</tool_call>"), "", [F1]),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', "", [F1, G]),
        ('[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', "", [F1, G]),
        ('[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"x": 1}', "", [F1]),
        ('<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', "", [F1, G]),
        ('{"name": "f", "parameters": {"x": 1}}', "", [F1]),
        ('{"type": "function", "name": "f", "parameters": {"x": 1}}', "", [F1]),
        ('{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}', "", [F1]),
        ('[{"name": "f", "arguments": {"x": 1}}]', "", [F1]),
        ('<function=f>{"x": 1}</function>', "", [F1]),
        # no calls: given back to the letter
        ("", "", []),
        ("a < b and [1] and <tool", "a < b and [1] and <tool", []),
        (UNKNOWN, UNKNOWN, []),
        (NO_OBJECT, NO_OBJECT, []),
        ("<tool_call>not json</tool_call> rest", "<tool_call>not json</tool_call> rest", []),
        ('{"name": "f"', '{"name": "f"', []),
        ('{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}', []),
        ('{"city": "Ulm"}', '{"city": "Ulm"}', []),
        ('{"name": "f", "parameters": {}} is a call', '{"name": "f", "parameters": {}} is a call', []),
        ("<tool_call>" + "[" * 3000, "<tool_call>" + "[" * 3000, []),
    ],
)  # fmt: skip
def test_calls_are_found_however_the_text_is_cut(text: str, shown: str, calls: list[Call], size: int | None) -> None:
    """Catches a marker across two pieces, a call that is lost, and text that is swallowed."""
    assert read(text, size=size) == (shown, calls)


ODD = st.text(alphabet='<>[]{}"/_:,;\\ \nfgtoalcTOLCARGSnameargumentsfunction=|python', max_size=60)


@given(st.lists(ODD | st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<function="])))
def test_no_text_is_lost_where_there_is_no_call(parts: list[str]) -> None:
    """Catches text that is held back and never given, or given twice, by whatever a model writes."""
    text = "".join(parts)
    tools, shown = ToolText(()), ""
    for part in parts:
        more, calls = tools.feed(part)
        assert calls == []
        shown += more
    more, calls = tools.finish()
    assert (shown + more, calls) == (text, [])


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()), st.integers(1, 9))
def test_arguments_come_through_as_they_were(arguments: dict[str, object], size: int) -> None:
    """Catches arguments that hold a closing marker's characters, quotes or other scripts."""
    text = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=False)
    if "</tool_call>" in text:
        return
    shown, calls = read(f"<tool_call>{text}</tool_call>", size=size)
    assert (shown, len(calls)) == ("", 1)
    assert json.loads(calls[0].arguments) == arguments


def test_text_is_given_at_once_when_it_can_not_be_a_call() -> None:
    """Catches a stream that shows nothing until the end whenever tools are offered."""
    tools = ToolText(("f",))
    assert tools.feed("The weather") == ("The weather", [])
    assert tools.feed(" is <b") == (" is <b", [])
    assert tools.feed(" and <to") == (" and ", [])
    assert tools.feed("ast>") == ("<toast>", [])
