"""Checks a value from a file and makes chat messages of it.

Two spellings are read: {"role", "content"} and ShareGPT's {"from", "value"}. Columns that hold lists may also hold them
as JSON text, which is how CSV carries them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from whet.data.examples import Message
from whet.errors import WhetError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}


def messages_of(value: Any, name: str, where: str, *, roles: Mapping[str, str] | None = None) -> list[Message]:
    """The value of the column `name` as messages. `roles` maps further role names to ours. Raises WhetError."""
    value = list_of(value, name, where)
    return [_message(item, f"{name}[{i}]", where, roles or {}) for i, item in enumerate(value)]


def list_of(value: Any, name: str, where: str) -> list[Any]:
    """A list with something in it, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:  # not JSON; or thousands of nested brackets
            raise WhetError(
                f"{name} is text where a list is wanted", where=where, fix="write a JSON list, as [{...}, {...}]"
            ) from error
    if not isinstance(value, list):
        raise WhetError(f"{name} is {kind(value)} where a list is wanted", where=where, fix="write a list")
    if not value:
        raise WhetError(f"{name} is an empty list", where=where, fix="remove the row")
    return value


def text_of(value: Any, name: str, where: str) -> str:
    """A string with more than spaces in it."""
    if not isinstance(value, str):
        raise WhetError(f"{name} is {kind(value)} where text is wanted", where=where, fix="write it as a string")
    if not value.strip():
        raise WhetError(f"{name} is empty", where=where, fix="fill it in, or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise WhetError(
            f"{name} holds half of a surrogate pair, at character {error.start + 1}",
            where=where,
            fix="write the text again with whole \\uXXXX\\uXXXX pairs",
        ) from error
    return value


def check_answered(messages: list[Message], name: str, where: str) -> None:
    """Raises WhetError where there is no turn to learn from."""
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise WhetError(
            f"{name} has no assistant turn, only {roles}", where=where, fix="add the answer, or remove the row"
        )


def kind(value: Any) -> str:
    """How to call the type of a value to someone who does not write Python."""
    if value is None:
        return "missing (null)"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _message(item: Any, name: str, where: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(item, dict):
        raise WhetError(
            f"{name} is {kind(item)} where a message is wanted",
            where=where,
            fix='write messages as {"role": "user", "content": "..."}',
        )
    item = {key: value for key, value in item.items() if value is not None}  # Parquet fills absent keys with null
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    role = item.pop(role_key, None)
    role = roles.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise WhetError(
            f"{name} has the unknown role {role!r}" if role is not None else f"{name} has no {role_key!r}",
            where=where,
            fix=f"use one of {', '.join([*ROLES, *roles])}",
        )
    content = _joined_parts(item.pop(content_key, None), f"{name}.{content_key}", where)
    if not (content in (None, "") and item.get("tool_calls")):
        content = text_of(content, f"{name}.{content_key}", where)
    return {"role": role, "content": content or "", **item}


def _joined_parts(content: Any, name: str, where: str) -> Any:
    """Content given as a list of typed parts becomes one string; other values pass through."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise WhetError(
                f"{name} has a part that is not text", where=where, fix='use parts like {"type": "text", "text": "..."}'
            )
    return "".join(part["text"] for part in content)
