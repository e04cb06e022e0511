"""Labels lie on the assistant's own tokens, exactly; nothing is masked, cut or refused in silence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import CHAT, build_tokenizer, conversations, labelled_runs, named, written_by_model
from whet.data.chat_formats import CHAT_FORMATS, find_format
from whet.data.examples import Conversation, Example
from whet.data.template import (
    preview,
    prompt_text,
    render,
    tokenize_conversation,
    tokenize_text,
)
from whet.errors import WhetError


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(named("chatml"))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", [chat_format.name for chat_format in CHAT_FORMATS])
@settings(deadline=None, max_examples=25)
@given(messages=conversations())
def test_labels_are_the_answers_and_their_stop_tokens_exactly(
    name: str, trim_offsets: bool, messages: list[dict[str, str]]
):
    """Catches a mask that is off by a token at either end, in any turn, for any text, and the template's line break
    after the stop token being learned."""
    tokenizer, chat_format = named(name, trim_offsets), find_format(name)
    tokenized = tokenize_conversation(tokenizer, messages, max_length=100_000)
    answers = [written_by_model(chat_format, m["content"]) for m in messages if m["role"] == "assistant"]
    assert labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels) == answers
    assert tokenizer.decode(tokenized.input_ids, clean_up_tokenization_spaces=False) == render(tokenizer, messages)
    assert tokenized.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    last = tokenize_conversation(tokenizer, messages, train_on="last", max_length=100_000)
    assert labelled_runs(tokenizer, last.input_ids, last.labels) == answers[-1:]
    everything = tokenize_conversation(tokenizer, messages, train_on="all", max_length=100_000)
    assert everything.labels == everything.input_ids == tokenized.input_ids


@pytest.mark.parametrize("name", ["chatml", "alpaca", "qwen-3", "zephyr"])
@pytest.mark.parametrize("content", ["\n\nYes", "\nYes", " Yes", "\n"])
def test_no_prompt_character_is_learned_where_tokens_straddle(name: str, content: str):
    """Catches a label on a token such as two line breaks, of which one is the prompt's."""
    tokenizer, chat_format = named(name), find_format(name)
    messages = [CHAT[0], {"role": "assistant", "content": content}]
    tokenized = tokenize_conversation(tokenizer, messages, max_length=1000)
    (run,) = labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels)
    assert written_by_model(chat_format, content).endswith(run)
    assert run.endswith(written_by_model(chat_format, content.strip()))


def test_spaces_that_offsets_leave_out_stay_with_the_prompt():
    """Catches a label on the prompt's last spaces, whose offsets such tokenizers put where the answer begins."""
    tokenizer = build_tokenizer(trim_offsets=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':  ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:  ' }}{% endif %}"
    )
    messages = [CHAT[0], {"role": "assistant", "content": "\nYes"}]
    tokenized = tokenize_conversation(tokenizer, messages, max_length=1000)
    assert labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels) == ["\nYes</s>"]


def test_generation_tags_decide_where_the_template_has_them():
    """Both answers carry the tags, the user turns not; a tag named in a comment counts for nothing."""
    tagged = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    for train_on, runs in [("responses", ["Yo<|im_end|>", "Ciao<|im_end|>"]), ("last", ["Ciao<|im_end|>"])]:
        tokenized = tokenize_conversation(tagged, CHAT, train_on=train_on, max_length=1000)
        assert labelled_runs(tagged, tokenized.input_ids, tokenized.labels) == runs
    commented = with_template("{# {% generation %} #}" + named("chatml").chat_template)
    tokenized = tokenize_conversation(commented, CHAT, max_length=1000)
    assert labelled_runs(commented, tokenized.input_ids, tokenized.labels) == ["Yo<|im_end|>", "Ciao<|im_end|>"]


def test_a_last_turn_may_be_written_differently():
    """Catches an end found by rendering the conversation only up to a turn: here the last answer alone gets a thought
    and the whole ends with a further token."""
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    tokenized = tokenize_conversation(tokenizer, CHAT, max_length=1000)
    runs = labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels)
    assert runs == ["Yo<|im_end|>", "<think></think>Ciao<|im_end|>"]


def test_tool_calls_belong_to_the_turn():
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for call in m['tool_calls'] %}{{ '<call>' + call['function']['name'] + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    messages = [CHAT[0], call, {"role": "tool", "content": "3"}, CHAT[1]]
    tokenized = tokenize_conversation(tokenizer, messages, max_length=1000)
    runs = labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels)
    assert runs == ["<call>add</call><|im_end|>", "Yo<|im_end|>"]


def test_a_stop_spelled_in_plain_text_is_learned_too():
    tokenizer = with_template(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\nSTOP\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenized = tokenize_conversation(tokenizer, CHAT, max_length=1000)
    runs = labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels)
    assert [run.strip() for run in runs] == ["Yo\nSTOP", "Ciao\nSTOP"]


@pytest.mark.parametrize(
    "template",
    [
        # the prompt opens a thought that the history does not have
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}",
        # the number of messages comes first
        "{{ messages | length }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        # the prompt already holds the answer and its end
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:Yo<|im_end|>' }}{% endif %}",
        # answers are left out
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_the_prompt_is_refused(template: str):
    with pytest.raises(WhetError, match="message 1: the tokenizer's chat template does not keep") as caught:
        tokenize_conversation(with_template(template), CHAT, max_length=1000)
    assert "train_on" in (caught.value.fix or "")


def test_a_refused_template_is_named_by_its_model():
    tokenizer = with_template("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.name_or_path = "models/acme"
    with pytest.raises(WhetError, match="the chat template of models/acme does not keep"):
        tokenize_conversation(tokenizer, CHAT, max_length=1000)


def test_no_template_and_no_messages_say_what_to_do(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(WhetError, match=r"template: chatml\), or call get_chat_template"):
        tokenize_conversation(tokenizer, CHAT, max_length=10)
    with pytest.raises(WhetError, match="no messages"):
        render(named("chatml"), [])
    with pytest.raises(WhetError, match="train_on"):
        tokenize_conversation(named("chatml"), CHAT, max_length=10, train_on="prompts")  # type: ignore[arg-type]


def test_an_answer_may_open_the_conversation():
    tokenizer = named("chatml")
    tokenized = tokenize_conversation(tokenizer, CHAT[1:], max_length=1000)
    assert labelled_runs(tokenizer, tokenized.input_ids, tokenized.labels) == ["Yo<|im_end|>", "Ciao<|im_end|>"]


def test_long_rows_are_cut_and_say_so():
    whole = tokenize_conversation(named("chatml"), CHAT, max_length=1000)
    length = len(whole.input_ids)
    assert not whole.truncated
    assert not tokenize_conversation(named("chatml"), CHAT, max_length=length).truncated
    cut = tokenize_conversation(named("chatml"), CHAT, max_length=length - 1)
    assert cut.truncated
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-1], whole.labels[:-1])


def test_prompt_text_is_what_the_last_answer_follows():
    tokenizer = named("gemma")
    text = render(tokenizer, CHAT)
    assert prompt_text(tokenizer, CHAT) == text.removesuffix("Ciao<end_of_turn>\n")
    assert prompt_text(tokenizer, CHAT[:1]) == prompt_text(tokenizer, CHAT[:2])


def test_raw_text_ends_with_one_end_token(tokenizer: PreTrainedTokenizerFast):
    for text in ("Hi there", "Hi there</s>"):
        tokenized = tokenize_text(tokenizer, text, max_length=100)
        assert tokenizer.decode(tokenized.input_ids) == "Hi there</s>"
        assert tokenized.labels == tokenized.input_ids
    assert tokenize_text(tokenizer, "Hi there", max_length=2).truncated


def test_raw_text_begins_with_one_first_token():
    """Catches the doubled first token of a text that was rendered by a chat template before."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for text in ("Hi", "<s>Hi"):
        assert tokenizer.decode(tokenize_text(tokenizer, text, max_length=100).input_ids) == "<s>Hi</s>"
    tokenizer.eos_token = None
    with pytest.raises(WhetError, match="no end-of-sequence token"):
        tokenize_text(tokenizer, "Hi", max_length=100)


def conversation(messages: list[dict[str, Any]], line: int = 1) -> Example:
    return Conversation(messages=messages, source="a.jsonl", line=line)


def test_the_preview_dims_what_is_masked():
    tokenizer = named("chatml")
    shown = preview(tokenizer, tokenize_conversation(tokenizer, CHAT, max_length=1000))
    assert shown.plain == render(tokenizer, CHAT)
    bright = [shown.plain[span.start : span.end] for span in shown.spans if span.style != "dim"]
    assert bright == ["Yo<|im_end|>", "Ciao<|im_end|>"]
