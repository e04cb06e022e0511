"""Texts of examples: taken out, and put back, with what is in tool calls' arguments among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whet.data.examples import Conversation, Example, Preference, Text, fields, spoken, texts, with_texts
from whet.data.json_text import Field, changed
from whet.data.redact.policy import Policy, load_policy
from whet.data.redact.redactor import Redactor


def call(arguments: Any) -> Conversation:
    """A conversation that calls a tool with these arguments."""
    function = {"name": "look_up", "arguments": arguments}
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    return Conversation(messages=[{"role": "user", "content": "Hi"}, answer], source="a.jsonl", line=1)


def arguments_of(example: Example) -> Any:
    assert isinstance(example, Conversation)
    return example.messages[1]["tool_calls"][0]["function"]["arguments"]


def taken(text: str) -> list[Field]:
    found: list[Field] = []
    changed(text, lambda field: found.append(field) or field.text)  # type: ignore[func-returns-value]
    return found


def redacted(example: Example, **classes: str) -> Example:
    policy = Policy(name="test", classes=classes or {"EMAIL": "placeholder", "SSN": "placeholder"})  # type: ignore[arg-type]
    said = fields(example)
    return with_texts(example, Redactor(policy).row([f.text for f in said], [f.label for f in said]).texts)


# ---------------------------------------------------------------- what is taken out


def test_values_are_texts_with_their_keys_and_names_of_functions_are_none():
    example = call('{"email": "jos\\u00e9@b.org", "note": "a\\nb", "ids": [12, "x"], "n": 3, "f": 1.25, "ok": true}')
    assert fields(example) == [
        Field("Hi"), Field(""),
        Field("josé@b.org", "email"), Field("a\nb", "note"), Field("12", "ids"), Field("x", "ids"),
    ]  # fmt: skip


def test_after_an_array_or_object_the_key_is_that_of_the_one_around_it():
    """Catches a label that leaks from what is inside to what comes after it."""
    assert taken('{"a": [{"b": "1"}, "2", ["3"], "4"], "c": {"d": {}, "e": "5"}}') == [
        Field("1", "b"), Field("2", "a"), Field("3", "a"), Field("4", "a"), Field("5", "e"),
    ]  # fmt: skip
    assert taken('["x"]') == [Field("x", "")]


def test_json_in_a_string_of_json_is_read_too():
    """Catches what is escaped twice, as the body of a request is."""
    inner = json.dumps({"to": "a@b.org", "note": "é\n"})
    text = json.dumps({"body": inner, "more": ["[77]"]})
    assert taken(text) == [Field("a@b.org", "to"), Field("é\n", "note"), Field("77", "more")]
    new = changed(text, lambda field: field.text.replace("a@b.org", '"'))
    assert json.loads(json.loads(new)["body"]) == {"to": '"', "note": "é\n"}


@pytest.mark.parametrize(
    "text", ["{", "{a: 1}", "12", '"x"', "", "[EMAIL]", '{"a": 1} {"b": 2}', "{'a': 'b'}", "[" * 10**5]
)
def test_what_is_no_json_is_one_text(text: str):
    assert taken(text) == [Field(text)]


def test_ids_and_types_are_texts_inside_arguments_and_none_outside():
    """Catches {"type": "mail", "id": "ann@example.org"}, which looks like a message's own keys."""
    for arguments in ({"id": "ann@example.org", "type": "mail"}, '{"id": "ann@example.org", "type": "mail"}'):
        assert texts(call(arguments)) == ["Hi", "", "ann@example.org", "mail"]


def test_a_text_that_is_json_is_taken_apart_wherever_it_stands():
    row = '{"note": "a\\u0040b.org"}'
    pair = Preference(
        prompt=[{"role": "tool", "content": row}], chosen=[{"role": "assistant", "content": row}],
        rejected=[{"role": "assistant", "content": "no"}], source="a", line=1,
    )  # fmt: skip
    assert texts(Text(text=row, source="a", line=1)) == ["a@b.org"]
    assert texts(pair) == ["a@b.org", "a@b.org", "no"]


def test_two_calls_that_differ_in_a_number_or_a_key_say_different_things():
    """Catches calls taken for duplicates since their strings are equal."""
    said = {tuple(spoken(call(json.dumps(arguments)))) for arguments in ({"a": 1}, {"a": 2}, {"b": 1})}
    assert len(said) == 3


# ---------------------------------------------------------------- what is put back

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
).filter(lambda value: isinstance(value, list | dict))
WAYS = st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@settings(deadline=None)
@given(value=JSON, way=WAYS, around=st.sampled_from(["", " ", "\n\t"]))
def test_what_does_not_change_stays_byte_for_byte(value: Any, way: dict[str, Any], around: str):
    for arguments in (around + json.dumps(value, **way) + around, value):
        example = call(arguments)
        assert arguments_of(with_texts(example, texts(example))) == arguments


@settings(deadline=None)
@given(value=JSON, way=WAYS, data=st.data())
def test_new_values_come_back_as_they_were_given_and_the_rest_stays(
    value: Any, way: dict[str, Any], data: st.DataObject
):
    """Catches quotes, backslashes and line breaks that end a value early, and keys or numbers that move."""
    example = call(json.dumps(value, **way))
    old = texts(example)
    new = [data.draw(st.just(text) | st.text().map("<".__add__), label=text) for text in old]  # "<": no JSON
    after = with_texts(example, new)
    assert texts(after) == new
    parsed = json.loads(arguments_of(after))
    assert shape(parsed) == shape(value)
    again = with_texts(after, old)
    assert texts(again) == old
    assert shape(json.loads(arguments_of(again))) == shape(value)


def shape(value: Any) -> Any:
    """The value without its texts: keys in their order, and what is neither a string nor an integer."""
    if isinstance(value, list):
        return [shape(item) for item in value]
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, str):
        return shape(json.loads(value)) if value[:1] in "[{" and taken(value) != [Field(value)] else "text"
    return "text" if type(value) is int else value


@settings(deadline=None)
@given(text=st.text() | JSON.map(json.dumps))
def test_any_text_is_put_back(text: str):
    example = Text(text=text, source="a", line=1)
    assert with_texts(example, texts(example)) == example


def test_spaces_order_doubled_keys_and_spellings_stay_around_what_changes():
    text = '{ "b":1.50,\n  "a" : "x@y.org", "a":"\\u00fc", "c": 1E5,"d":"x@y.org"}'
    assert changed(text, lambda field: field.text.replace("x@y.org", "ü\n")) == (
        '{ "b":1.50,\n  "a" : "ü\\n", "a":"\\u00fc", "c": 1E5,"d":"ü\\n"}'
    )


def test_half_of_a_surrogate_pair_is_shown_as_a_text_and_stays_if_nothing_changes():
    """Catches a model's tokenizer that stops at "\\ud800"."""
    text = '{"a": "\\ud800 x"}'
    assert taken(text) == [Field("\ufffd x", "a")]
    assert changed(text, lambda field: field.text) == text
    assert changed(text, lambda field: field.text + "y") == '{"a": "\ufffd xy"}'


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_texts_is_refused(count: int):
    with pytest.raises((ValueError, StopIteration)):
        with_texts(call('{"a": 5}'), ["x"] * count)


# ---------------------------------------------------------------- redaction


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"to": "ann\\u0040example.org"}', {"to": "[EMAIL]"}),
        ('{"note": "line\\nann@example.org\\n\\"x\\""}', {"note": 'line\n[EMAIL]\n"x"'}),
        ('{"to":["ann@example.org",{"cc":"j\\u006f@example.org"}]}', {"to": ["[EMAIL]", {"cc": "[EMAIL]"}]}),
        ('{"ssn": 123456789, "n": 123456789.5}', {"ssn": "[SSN]", "n": 123456789.5}),
        ('{"ssn": "123456789"}', {"ssn": "[SSN]"}),
        ({"ssn": 123456789, "n": True}, {"ssn": "[SSN]", "n": True}),
        ('{"socialSecurityNumber": "123456789"}', {"socialSecurityNumber": "[SSN]"}),
        ('{"order": 123456789}', {"order": 123456789}),
        ('{"ann@example.org": "x"}', {"ann@example.org": "x"}),
    ],
)
def test_arguments_are_redacted_and_still_parse(arguments: Any, value: Any):
    """Catches data that escapes hide, and labels (keys) that do not reach the finder."""
    after = arguments_of(redacted(call(arguments)))
    assert (json.loads(after) if isinstance(arguments, str) else after) == value


def test_a_value_that_was_found_in_a_message_goes_from_the_arguments():
    example = call('{"q": "orders of lee-77@example.org"}')
    example.messages[0]["content"] = "I am lee-77@example.org"
    assert texts(redacted(example)) == ["I am [EMAIL]", "", "orders of [EMAIL]"]


VALUES = st.sampled_from(
    [
        "ann@example.org",
        "tel 212-664-7665",
        "123-45-6789",
        "Dr. Ann Lee",
        "born 4 March 2021",
        '"\\',
        "é\n",
        "02139",
        "",
    ]
)
KEYS = st.sampled_from(["email", "ssn", "patientName", "phone_number", "note", "zip", "dob", "age", "account number"])
RECORD = st.dictionaries(KEYS, VALUES | st.integers(0, 10**10) | st.lists(VALUES, max_size=3), min_size=1, max_size=5)


@settings(deadline=None, max_examples=60)
@given(record=RECORD, way=WAYS, policy=st.sampled_from(["hipaa-safe-harbor", "cmmc-cui"]))
def test_redacted_arguments_parse_and_redacted_again_are_themselves(record: Any, way: dict[str, Any], policy: str):
    redactor = Redactor(load_policy(policy, Path()))

    def once(example: Example) -> Example:
        said = fields(example)
        return with_texts(example, redactor.row([f.text for f in said], [f.label for f in said]).texts)

    after = once(call(json.dumps(record, **way)))
    assert list(json.loads(arguments_of(after))) == list(record)
    assert once(after) == after
