"""What a request brings, checked and made plain: chat messages as templates expect them (content as one text, the
arguments of tool calls as objects), and token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from whet.serve.interface import Refused


def plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Raises Refused for content that is no text, and for arguments that are no JSON."""
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = _text(message.get("content"))
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    return plain


def check_ids(ids: Any, size: int, param: str) -> list[int]:
    """Token ids of a vocabulary of `size`. Raises Refused for what is none. param: the field that they came in."""
    tokens = list(ids)
    if any(isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size for token in tokens):
        raise Refused(f"token ids are whole numbers from 0 to {size - 1}", param)
    return tokens


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = [_text_part(part) for part in content] if isinstance(content, list | tuple) else [None]
    if None in parts:
        raise Refused("this model reads text alone", "messages")
    return "".join(str(part) for part in parts)


def _text_part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments or "{}")
        except ValueError:
            raise Refused("a tool call's arguments are not valid JSON", "messages") from None
    return {**call, "function": function}
