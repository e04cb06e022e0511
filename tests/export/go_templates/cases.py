"""Conversations under every chat format of whet's, and the Go template of each."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.export.tiny_llama import byte_level_tokenizer
from whet.data.chat_formats import CHAT_FORMATS
from whet.data.chat_templates import get_chat_template
from whet.export.go_template import go_template, read_turns

FOLDER = Path(__file__).parent
RENDERED = FOLDER / "rendered.json"

TURNS = ("What is 2 + 2?", 'It is {{ "4" }}.\n\n\tQED', "And </s> <b>3</b> `x`?", "日本語 🙂", "ok")


@functools.cache
def tokenizer_with(name: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer()
    get_chat_template(tokenizer, name, map_eos_token=False)
    return tokenizer


def conversations(system: bool) -> list[list[dict[str, Any]]]:
    """One, two and three user turns, each without a system message and, where there can be one, with one."""
    found = []
    for opening in ([], [{"role": "system", "content": "Be brief.\nVery."}]) if system else ([],):
        for count in (1, 3, 5):
            turns = [{"role": ("user", "assistant")[i % 2], "content": TURNS[i]} for i in range(count)]
            found.append([*opening, *turns])
    return found


def cases() -> list[dict[str, Any]]:
    """name of the format, template, messages. The file's BOS is written by the template, or by the engine ("bos")."""
    made = []
    for chat_format in CHAT_FORMATS:
        turns = read_turns(tokenizer_with(chat_format.name))
        for bos in (None, "<s>") if chat_format.bos else (None,):
            for messages in conversations(turns.with_system is not None):
                template = go_template(turns, bos)
                made.append({"name": chat_format.name, "bos": bos, "template": template, "messages": messages})
    return made
