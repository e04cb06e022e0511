"""What a judge reads. The texts that it judges are kept apart from what it is told, so that they cannot speak to it.

Each stands between lines with a mark made of a digest of all of them. A text that holds its own request's mark would
have to hold a digest of itself. What chat templates use as control tokens is broken up by a space, since a tokenizer
would read it as the end of the message, and a local model's would not even show it as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from whet.data.examples import Message
from whet.evals.judge.settings import JudgeSettings

FOLDER = Path(__file__).parent
MARK_DIGITS = 16
GRADE = "Grade the answer."
COMPARE = "Compare the first answer with the second."

CONTROL = re.compile(
    r"<(?=\|[^<>|\n]{1,64}\|>)"  # ChatML, Llama 3, Phi, GPT: <|im_end|>
    r"|<(?=\uff5c[^<>\uff5c\n]{1,64}\uff5c>)"  # DeepSeek's, with a full-width bar
    r"|<(?=/?s>|/?SYS>|<SYS>|</SYS>|(?:start|end)_of_turn>|(?:bos|eos|pad|unk)>)"  # Llama 2, Gemma
    r"|\[(?=/?[A-Z][A-Z_]{2,30}\])"  # Mistral: [INST], [/INST], [TOOL_CALLS]
)
"""The first character of what some chat template takes for a control token."""


def conversation(
    settings: JudgeSettings, template: str, example: str, task: str, blocks: Sequence[tuple[str, str]]
) -> list[Message]:
    """The judge's messages: the rubric in `template`, then (name, text) of each block."""
    rubric = _filled(template, criteria=settings.criteria, example=example)
    harmless = [(name, broken_up(text)) for name, text in blocks]
    request = _filled("request.jinja", mark=mark_of(harmless), blocks=harmless, task=task)
    if settings.system:
        return [{"role": "system", "content": rubric}, {"role": "user", "content": request}]
    return [{"role": "user", "content": f"{rubric}\n\n{request}"}]


def again(reply: str, fault: str, example: str) -> list[Message]:
    """What follows on a reply that was no verdict."""
    text = _filled("again.jinja", fault=fault, example=example)
    return [{"role": "assistant", "content": broken_up(reply)}, {"role": "user", "content": text}]


def mark_of(blocks: Sequence[tuple[str, str]]) -> str:
    """The same texts have the same mark, so that a run can be repeated."""
    return hashlib.sha256(json.dumps(list(blocks)).encode()).hexdigest()[:MARK_DIGITS]


def broken_up(text: str) -> str:
    """The text with a space in each control token; nothing else changes."""
    return CONTROL.sub(lambda found: found[0] + " ", text)


def _filled(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values).strip()


@cache
def _environment() -> jinja2.Environment:
    """Plain text, so nothing is escaped; a value is never read as a template."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
