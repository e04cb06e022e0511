"""The named templates write what the models were trained on. The texts here are spelled out by hand."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from whet.data.chat_formats import CHAT_FORMATS, find_format
from whet.data.chat_templates import get_chat_template
from whet.data.template import render
from whet.errors import WhetError

CHAT = [
    {"role": "system", "content": "Sys."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
THOUGHT = "<think>\n\n</think>\n\n"
EXPECTED = {
    "chatml": "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nSys.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Sys.\n\nHi[/INST] Yo</s>[INST] Bye[/INST]",
    "gemma": "<s><start_of_turn>user\nSys.\n\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "phi-3": "<|system|>\nSys.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nYo<|end|>\n"
    "<|user|>\nBye<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>Sys.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
    "<|im_start|>assistant<|im_sep|>Yo<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>",
    "qwen-3": "<|im_start|>system\nSys.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    f"<|im_start|>assistant\n{THOUGHT}Yo<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n{THOUGHT}",
    "zephyr": "<|system|>\nSys.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
    "alpaca": "Sys.\n\n### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "vicuna": "Sys. USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT:",
}
EXPECTED["qwen-2.5"] = EXPECTED["chatml"]


@pytest.mark.parametrize("name", [chat_format.name for chat_format in CHAT_FORMATS])
def test_each_template_writes_its_format(tokenizer: PreTrainedTokenizerFast, name: str):
    get_chat_template(tokenizer, name)
    assert render(tokenizer, CHAT, add_generation_prompt=True) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("alpaca", "Below is an instruction that describes a task. Write a response"),
        ("vicuna", "A chat between a curious user and an artificial intelligence assistant. The assistant"),
        ("qwen-2.5", "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud."),
        ("chatml", "<|im_start|>user\nBye"),
        ("mistral", "<s>[INST] Bye[/INST]"),
    ],
)
def test_a_format_brings_its_own_system_message(tokenizer: PreTrainedTokenizerFast, name: str, beginning: str):
    get_chat_template(tokenizer, name)
    assert render(tokenizer, CHAT[-1:]).startswith(beginning)


def test_a_system_message_given_replaces_it_and_may_hold_quotes(tokenizer: PreTrainedTokenizerFast):
    """Catches a message that breaks out of its Jinja literal."""
    message = 'It\'s {{ 1 + 1 }} \\n "é"\n%}'
    for name in ("vicuna", "gemma", "chatml"):
        get_chat_template(tokenizer, name, system_message=message)
        assert message in render(tokenizer, CHAT[-1:])
        assert message not in render(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("llama3", "llama-3"),
        ("llama-3.1", "llama-3"),
        ("Llama3.2", "llama-3"),
        ("gemma-2", "gemma"),
        ("gemma3", "gemma"),
        ("qwen2.5", "qwen-2.5"),
        ("qwen3", "qwen-3"),
        ("phi-3.5", "phi-3"),
        ("phi4", "phi-4"),
    ],
)
def test_names_may_be_written_in_any_punctuation(written: str, name: str):
    assert find_format(written).name == name


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(WhetError, match="use vicuna"):
        find_format("vicunna")


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("chatml", [CHAT[1], CHAT[0]], "no place here for the role system"),
        ("mistral", [{"role": "tool", "content": "3"}], "no place here for the role tool"),
        ("gemma", [CHAT[0], CHAT[2]], "needs a user turn after the system message"),
        ("llama-3", [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}], "no tool calls"),
    ],
)
def test_a_template_refuses_what_it_would_lose(
    tokenizer: PreTrainedTokenizerFast, name: str, messages: list[dict[str, object]], says: str
):
    """Catches templates that drop a system text, a tool's answer or a tool call in silence."""
    get_chat_template(tokenizer, name)
    with pytest.raises(WhetError, match=says):
        render(tokenizer, messages)


def test_tool_answers_are_written_where_the_format_has_them(tokenizer: PreTrainedTokenizerFast):
    answer = [CHAT[1], {"role": "tool", "content": "3"}]
    for name, text in [
        ("llama-3", "<|start_header_id|>ipython<|end_header_id|>\n\n3<|eot_id|>"),
        ("qwen-3", "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"),
    ]:
        get_chat_template(tokenizer, name)
        assert render(tokenizer, answer).endswith(text)
