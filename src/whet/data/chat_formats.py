"""The chat formats that models of this field were trained on, and the Jinja template that each gives.

A format is what stands before and after a message of each role. Every template is made from one skeleton, so that all
have the property that masking and the server's cache rest on: a conversation's text begins with the text of its
beginning, generation prompt included. Sources: the model cards and tokenizer configurations of the named models.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import NamedTuple

from whet.errors import WhetError

EOS = "\0"
"""Stands in a format for the tokenizer's own end-of-sequence token."""


class Around(NamedTuple):
    """What stands before and after the content of a message."""

    before: str
    after: str


@dataclass(frozen=True)
class ChatFormat:
    """system: None where the format has no such role: the text then opens the first user turn, before an empty line.
    assistant: `before` is the generation prompt; `after` begins with the token that ends the turn.
    lead: what the model itself writes before an answer's text.
    end_token: the token that ends an answer; None for the tokenizer's end-of-sequence token.
    bos: the conversation begins with the tokenizer's beginning-of-sequence token.
    trim: spaces round a message are dropped.
    """

    name: str
    user: Around
    assistant: Around
    system: Around | None = None
    tool: Around | None = None
    lead: str = ""
    end_token: str | None = None
    bos: bool = False
    trim: bool = False
    default_system: str = ""

    @property
    def instruction_part(self) -> str:
        """The text that marks the start of a user turn."""
        return self.user.before.rstrip(" ")

    @property
    def response_part(self) -> str:
        """The text that marks the start of an answer."""
        return self.assistant.before or self.user.after


def find_format(name: str) -> ChatFormat:
    """The format of that name, however it is punctuated: llama-3.1, llama3.1, Llama-31. Raises WhetError."""
    key = _key(name)
    for chat_format in CHAT_FORMATS:
        if key in (_key(chat_format.name), *ALIASES.get(chat_format.name, ())):
            return chat_format
    names = [chat_format.name for chat_format in CHAT_FORMATS]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    raise WhetError(
        f"no chat template is called {name!r}", where="chat_template", fix=f"use {', '.join(near or names)}"
    )


def _key(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())


CHATML_END = "<|im_end|>"
PHI3_END = "<|end|>"
LLAMA3_END = "<|eot_id|>"
GEMMA_END = "<end_of_turn>"


def _chatml(role: str) -> Around:
    return Around(f"<|im_start|>{role}\n", f"{CHATML_END}\n")


def _llama3(role: str) -> Around:
    return Around(f"<|start_header_id|>{role}<|end_header_id|>\n\n", LLAMA3_END)


def _gemma(role: str) -> Around:
    return Around(f"<start_of_turn>{role}\n", f"{GEMMA_END}\n")


def _phi3(role: str) -> Around:
    return Around(f"<|{role}|>\n", f"{PHI3_END}\n")


def _phi4(role: str) -> Around:
    return Around(f"<|im_start|>{role}<|im_sep|>", CHATML_END)


def _zephyr(role: str) -> Around:
    return Around(f"<|{role}|>\n", f"{EOS}\n")


QWEN_TOOL = Around("<|im_start|>user\n<tool_response>\n", f"\n</tool_response>{CHATML_END}\n")

CHAT_FORMATS = (
    ChatFormat(
        "chatml",
        system=_chatml("system"),
        user=_chatml("user"),
        assistant=_chatml("assistant"),
        tool=_chatml("tool"),
        end_token=CHATML_END,
    ),
    ChatFormat(
        "llama-3",
        system=_llama3("system"),
        user=_llama3("user"),
        assistant=_llama3("assistant"),
        tool=_llama3("ipython"),
        end_token=LLAMA3_END,
        bos=True,
        trim=True,
    ),
    ChatFormat("mistral", user=Around("[INST] ", "[/INST]"), assistant=Around("", EOS), lead=" ", bos=True),
    ChatFormat("gemma", user=_gemma("user"), assistant=_gemma("model"), end_token=GEMMA_END, bos=True, trim=True),
    ChatFormat("phi-3", system=_phi3("system"), user=_phi3("user"), assistant=_phi3("assistant"), end_token=PHI3_END),
    ChatFormat("phi-4", system=_phi4("system"), user=_phi4("user"), assistant=_phi4("assistant"), end_token=CHATML_END),
    ChatFormat(
        "qwen-2.5",
        system=_chatml("system"),
        user=_chatml("user"),
        assistant=_chatml("assistant"),
        tool=QWEN_TOOL,
        end_token=CHATML_END,
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    # Qwen3 without thinking: every answer opens with the empty thought that its own template puts in the prompt.
    ChatFormat(
        "qwen-3",
        system=_chatml("system"),
        user=_chatml("user"),
        assistant=Around("<|im_start|>assistant\n<think>\n\n</think>\n\n", f"{CHATML_END}\n"),
        tool=QWEN_TOOL,
        end_token=CHATML_END,
    ),
    ChatFormat("zephyr", system=_zephyr("system"), user=_zephyr("user"), assistant=_zephyr("assistant")),
    ChatFormat(
        "alpaca",
        system=Around("", "\n\n"),
        user=Around("### Instruction:\n", "\n\n"),
        assistant=Around("### Response:\n", f"{EOS}\n\n"),
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    ),
    ChatFormat(
        "vicuna",
        system=Around("", " "),
        user=Around("USER: ", " "),
        assistant=Around("ASSISTANT:", EOS),
        lead=" ",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
)

ALIASES = {
    "llama-3": ("llama31", "llama32", "llama33"),
    "gemma": ("gemma2", "gemma3"),
    "phi-3": ("phi35",),
}


# ---------------------------------------------------------------- Jinja


def jinja(chat_format: ChatFormat, *, mapping: dict[str, str], system_message: str | None = None) -> str:
    """The format as a Jinja chat template.

    mapping: the keys of a message that hold "role" and "content", and the names of "user" and "assistant". Messages
        with the standard keys and names are rendered too, so that a model saved with the template can be served.
    system_message: used where a conversation has none; None: the format's own.
    """
    default_system = chat_format.default_system if system_message is None else system_message
    content = _key_of("content", mapping) + (" | trim" if chat_format.trim else "")
    lines = [
        *(["{{- bos_token }}"] if chat_format.bos else []),
        f"{{%- if messages and {_key_of('role', mapping, 'messages[0]')} == 'system' %}}",
        f"    {{%- set system = {_key_of('content', mapping, 'messages[0]')}{' | trim' * chat_format.trim} %}}",
        "    {%- set turns = messages[1:] %}",
        "{%- else %}",
        f"    {{%- set system = {_literal(default_system)} %}}",
        "    {%- set turns = messages %}",
        "{%- endif %}",
        *_system_lines(chat_format, mapping),
        "{%- for message in turns %}",
        f"    {{%- set role = {_key_of('role', mapping)} %}}",
        f"    {{%- set content = {content} %}}",
        "    {%- if message['tool_calls'] %}",
        f"        {{{{- raise_exception('the {chat_format.name} template has no tool calls') }}}}",
        "    {%- endif %}",
        *_turn_lines(chat_format, mapping),
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        f"    {{{{- {_literal(chat_format.assistant.before)} }}}}",
        "{%- endif %}",
    ]
    return "\n".join(lines)


def _system_lines(chat_format: ChatFormat, mapping: dict[str, str]) -> list[str]:
    if chat_format.system is not None:
        return ["{%- if system %}", f"    {{{{- {_around(chat_format.system, 'system')} }}}}", "{%- endif %}"]
    return [
        f"{{%- if system and not (turns and {_is('user', mapping, _key_of('role', mapping, 'turns[0]'))}) %}}",
        f"    {{{{- raise_exception('the {chat_format.name} template needs a user turn after the system message') }}}}",
        "{%- endif %}",
    ]


def _turn_lines(chat_format: ChatFormat, mapping: dict[str, str]) -> list[str]:
    user = "content"
    if chat_format.system is None:
        user = "(system + '\\n\\n' + content if system and loop.first else content)"
    assistant = Around(chat_format.assistant.before + chat_format.lead, chat_format.assistant.after)
    branches = [
        (_is("user", mapping, "role"), _around(chat_format.user, user)),
        (_is("assistant", mapping, "role"), _around(assistant, "content")),
    ]
    if chat_format.tool is not None:
        branches.append(("role == 'tool'", _around(chat_format.tool, "content")))
    lines = []
    for keyword, (condition, output) in zip(("if", "elif", "elif"), branches, strict=False):
        lines += [f"    {{%- {keyword} {condition} %}}", f"        {{{{- {output} }}}}"]
    message = _literal(f"the {chat_format.name} template has no place here for the role ")
    return [*lines, "    {%- else %}", f"        {{{{- raise_exception({message} ~ role) }}}}", "    {%- endif %}"]


def _key_of(key: str, mapping: dict[str, str], message: str = "message") -> str:
    """The Jinja expression for the role or content of a message."""
    standard, mapped = f"{message}['{key}']", f"{message}[{_literal(mapping[key])}]"
    return standard if mapping[key] == key else f"({mapped} or {standard})"


def _is(role: str, mapping: dict[str, str], expression: str) -> str:
    names = list(dict.fromkeys([role, mapping[role]]))
    if len(names) == 1:
        return f"{expression} == {_literal(role)}"
    return f"{expression} in [{', '.join(_literal(name) for name in names)}]"


def _around(around: Around, content: str) -> str:
    return " + ".join(part for part in (_literal(around.before), content, _literal(around.after)) if part != "''")


def _literal(text: str) -> str:
    """Text as a Jinja expression; the tokenizer's end-of-sequence token is read when the template runs."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    parts: list[str] = []
    for i, piece in enumerate(escaped.split(EOS)):
        parts += (["eos_token"] if i else []) + ([f"'{piece}'"] if piece else [])
    return " + ".join(parts) or "''"
