"""Markers find the answers in rows that are token ids already, whatever the tokenizer merged at their ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.data.conftest import CHAT, conversations, labelled_runs, named
from whet.data.chat_formats import CHAT_FORMATS, EOS, find_format
from whet.data.labels import IGNORE
from whet.data.markers import mask_by_markers
from whet.data.template import tokenize_conversation
from whet.errors import WhetError


@pytest.mark.parametrize("name", [chat_format.name for chat_format in CHAT_FORMATS])
@settings(deadline=None, max_examples=15)
@given(messages=conversations())
def test_markers_find_the_same_answers(name: str, messages: list[dict[str, str]]):
    """What follows the response marker up to the next instruction marker; the format's own line breaks come too."""
    tokenizer, chat_format = named(name), find_format(name)
    input_ids = tokenize_conversation(tokenizer, messages, max_length=100_000).input_ids
    labels = mask_by_markers(tokenizer, input_ids, chat_format.instruction_part, chat_format.response_part)
    after = chat_format.assistant.after.replace(EOS, "</s>")
    answers = [chat_format.lead + m["content"] + after for m in messages if m["role"] == "assistant"]
    assert labelled_runs(tokenizer, input_ids, labels) == answers


def test_a_marker_merged_with_its_neighbours_is_still_found():
    """Catches a search among token ids: the marker's outer line breaks are one token with the text beside them."""
    tokenizer = named("alpaca")
    text = "### Instruction:\nA\n\n\n\n### Response:\n\n\nYes</s>\n\n### Instruction:\nB\n\n### Response:\nNo"
    input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = labelled_runs(
        tokenizer, input_ids, mask_by_markers(tokenizer, input_ids, "### Instruction:\n", "### Response:\n")
    )
    assert [run.strip("\n") for run in runs] == ["Yes</s>", "No"]
    # Line breaks that a marker names are its own, at either end.
    runs = labelled_runs(
        tokenizer, input_ids, mask_by_markers(tokenizer, input_ids, "\n\n### Instruction:", "### Response:")
    )
    assert [run.lstrip("\n") for run in runs] == ["Yes</s>", "No"]


def test_markers_survive_a_cut_and_characters_of_several_tokens():
    tokenizer, chat_format = named("chatml"), find_format("chatml")
    messages = [{"role": "user", "content": "漢字😀"}, {"role": "assistant", "content": "😀漢字😀"}]
    whole = tokenize_conversation(tokenizer, messages, max_length=1000)
    markers = (chat_format.instruction_part, chat_format.response_part)
    expected = mask_by_markers(tokenizer, whole.input_ids, *markers)
    for length in range(len(whole.input_ids)):
        assert mask_by_markers(tokenizer, whole.input_ids[:length], *markers) == expected[:length]


def test_markers_that_are_absent_or_unusable_do_not_pass_in_silence():
    tokenizer = named("chatml")
    input_ids = tokenize_conversation(tokenizer, CHAT, max_length=1000).input_ids
    assert set(mask_by_markers(tokenizer, input_ids, "[INST]", "[/INST]")) == {IGNORE}
    for markers in [("\n", "<|im_start|>assistant\n"), ("user", "user\n")]:
        with pytest.raises(WhetError, match="cannot tell prompts from answers"):
            mask_by_markers(tokenizer, input_ids, *markers)


def test_an_answer_ends_where_the_next_question_begins_or_the_row_does():
    """Catches a mask that never closes: prompts between answers, and what comes before the first, are not learned."""
    tokenizer = named("chatml")
    text = "Yo U: a R: b U: c U: d R: e R: f"
    input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = labelled_runs(tokenizer, input_ids, mask_by_markers(tokenizer, input_ids, "U:", "R:"))
    assert runs == [" b ", " e ", " f"]


def test_a_row_without_tokens_has_no_labels():
    assert mask_by_markers(named("chatml"), [], "<|im_start|>user", "<|im_start|>assistant") == []
