"""Values inside JSON: what a tool is called with, mostly as one string.

    '{"email": "jos\\u00e9@example.org", "note": "a\\nb", "ssn": 123456789}'
        email: josé@example.org        note: a⏎b        ssn: 123456789

In the string itself, escapes hide what stands there, and what is put in its place could end a value early. So each
value is a text of its own, its key beside it, which often says what it is. Only values that change are written anew;
every other character stays: spaces, the order of keys, keys that stand twice, the spelling of numbers and escapes.

Strings are read wherever they stand, those in JSON that is itself in a string too. Of numbers, integers of two digits
and more are read (an age, an SSN, a card), and one that changes becomes a string: JSON has no number for "[SSN]".
Keys, fractions, true, false and null are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A text, and the key it stands under in JSON: "" where an array has none, None where there is no JSON."""

    text: str
    label: str | None = None


Change = Callable[[Field], str]
"""A field's new text."""

BLANK = " \t\n\r"
TOKEN = re.compile(
    r'(?P<string>"[^"\\]*(?:\\.[^"\\]*)*")(?P<key>[ \t\n\r]*:)?|(?P<number>-?[0-9][0-9.eE+\-]*)|[{}\[\]]', re.DOTALL
)
"""What matters of a text that is known to be JSON."""
INTEGER = re.compile("-?[0-9]{2,}")


def changed(text: str, change: Change, label: str | None = None) -> str:
    """The text after `change`, or, if all of it is a JSON object or array, with the values inside changed.

    Line breaks inside strings are let pass, which JSON forbids and models write. What is no JSON otherwise is one text.
    """
    if not _is_json(text):
        return change(Field(text, label))
    parts, done = [], 0
    label, above = label or "", list[str]()
    for token in TOKEN.finditer(text):
        if token[0] in ("{", "["):
            above.append(label)
        elif token[0] in ("}", "]"):
            label = above.pop()
        elif token["key"]:
            label = _decoded(token["string"])
        elif new := _changed_token(token, change, label):
            parts += [text[done : token.start()], new]
            done = token.end()
    return "".join([*parts, text[done:]])


def changed_value(value: Any, change: Change, label: str = "") -> Any:
    """The same for JSON that was parsed before: objects, arrays, strings and numbers."""
    if isinstance(value, str):
        return changed(value, change, label)
    if isinstance(value, list):
        return [changed_value(item, change, label) for item in value]
    if isinstance(value, dict):
        return {key: changed_value(item, change, str(key)) for key, item in value.items()}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10:
        new = change(Field(str(value), label))
        return value if new == str(value) else new
    return value


def _changed_token(token: re.Match[str], change: Change, label: str) -> str | None:
    """JSON of the new value; None where it stays."""
    if token["string"]:
        text = _decoded(token["string"])
        new = changed(text, change, label)
    elif INTEGER.fullmatch(text := token["number"]):
        new = change(Field(text, label))
    else:
        return None
    return None if new == text else json.dumps(new, ensure_ascii=False)


def _decoded(string: str) -> str:
    """What a JSON string says. Halves of surrogate pairs, which no model's tokenizer takes, are shown as U+FFFD."""
    text: str = json.loads(string, strict=False)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if "\\u" in string else text


def _is_json(text: str) -> bool:
    bare = text.strip(BLANK)
    if bare[:1] + bare[-1:] not in ("{}", "[]"):
        return False
    try:
        json.loads(bare, strict=False)
    except (ValueError, RecursionError):
        return False
    return True
