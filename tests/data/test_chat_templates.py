"""The helpers notebooks call: templates for tokenizers, older data-set shapes."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from whet.data.chat_formats import CHAT_FORMATS
from whet.data.chat_templates import get_chat_template, merge_columns, standardize_data_formats, to_sharegpt
from whet.data.template import render
from whet.errors import WhetError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]


def test_the_end_token_is_mapped_and_the_vocabulary_never_grows(tokenizer: PreTrainedTokenizerFast):
    size = len(tokenizer)
    assert get_chat_template(tokenizer, "llama-3") is tokenizer
    assert tokenizer.eos_token == "<|eot_id|>"
    get_chat_template(tokenizer, "gemma", map_eos_token=False)
    assert tokenizer.eos_token == "<|eot_id|>"
    assert len(tokenizer) == size


def test_an_end_token_outside_the_vocabulary_is_refused(tokenizer: PreTrainedTokenizerFast):
    """Catches a token that would be added, and embeddings that would be resized, in silence."""
    from tokenizers import Tokenizer, models

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    with pytest.raises(WhetError, match="not in the vocabulary") as caught:
        get_chat_template(plain, "chatml")
    assert "zephyr" in (caught.value.fix or "")
    assert "gemma" not in (caught.value.fix or "")
    assert plain.chat_template is None
    get_chat_template(plain, "chatml", map_eos_token=False)
    assert plain.eos_token == "</s>"
    with pytest.raises(WhetError, match="beginning-of-sequence"):
        get_chat_template(plain, "mistral")


@pytest.mark.parametrize("name", ["chatml", "gemma", "mistral", "llama-3", "vicuna"])
def test_the_sharegpt_mapping_renders_the_same_text_from_both_spellings(tokenizer: PreTrainedTokenizerFast, name: str):
    standard = render(get_chat_template(tokenizer, name), CHAT, add_generation_prompt=True)
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    get_chat_template(tokenizer, name, mapping=mapping)
    for messages in (SHAREGPT, CHAT):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == standard


def test_a_name_like_no_other_gets_the_list(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(WhetError, match="no chat template is called '!'") as caught:
        get_chat_template(tokenizer, "!")
    assert all(chat_format.name in (caught.value.fix or "") for chat_format in CHAT_FORMATS)
    assert tokenizer.chat_template is None


def test_a_system_message_fills_in_where_a_conversation_has_none(tokenizer: PreTrainedTokenizerFast):
    get_chat_template(tokenizer, "qwen-2.5", system_message="Be brief.")
    assert render(tokenizer, CHAT).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    own = [{"role": "system", "content": "Own."}, *CHAT]
    assert render(tokenizer, own).startswith("<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user")
    get_chat_template(tokenizer, "qwen-2.5", system_message="")
    assert render(tokenizer, CHAT).startswith("<|im_start|>user")


def test_an_unknown_mapping_key_is_refused(tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(WhetError, match="unknown key 'human'") as caught:
        get_chat_template(tokenizer, "chatml", mapping={"human": "user"})
    assert caught.value.fix == "use role, content, user, assistant"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHAREGPT},
        {"conversations": CHAT},
        {"messages": CHAT},
        {"instruction": "Hi", "input": "", "output": "Yo"},
        {"prompt": "Hi", "completion": "Yo"},
    ],
)
def test_every_shape_becomes_role_and_content_conversations(row: dict[str, Any]):
    dataset = standardize_data_formats(Dataset.from_list([{**row, "id": 7}] * 2))
    assert sorted(dataset.column_names) == ["conversations", "id"]
    assert dataset[1] == {"id": 7, "conversations": CHAT}


def test_tool_calls_are_kept():
    """Catches a call that is dropped in silence, which leaves an empty answer to learn."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    dataset = standardize_data_formats(Dataset.from_list([{"messages": [CHAT[0], call]}]))
    assert dataset[0]["conversations"][1]["tool_calls"] == [{"name": "add"}]


def test_a_tool_call_may_come_late():
    """Catches columns inferred from the first thousand rows: the call after them failed with a TypeError."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    rows = [{"messages": CHAT, "id": 1}] * 1001 + [{"messages": [CHAT[0], call], "id": 2}]
    for dataset in (Dataset.from_list(rows), Dataset.from_list(rows).to_iterable_dataset()):
        *_, last = standardize_data_formats(dataset)
        assert last["id"] == 2
        assert last["conversations"][1]["tool_calls"] == [{"name": "add"}]


def test_a_row_of_no_such_shape_is_named():
    rows = [{"prompt": "Hi", "completion": "Yo"}, {"prompt": "Hi", "completion": " "}]
    with pytest.raises(WhetError, match="dataset row:1: completion is empty"):
        standardize_data_formats(Dataset.from_list(rows))
    with pytest.raises(WhetError, match="no conversations"):
        standardize_data_formats(Dataset.from_list([{"text": "x"}]))
    with pytest.raises(WhetError, match="no rows"):
        standardize_data_formats(Dataset.from_list([]))


def test_a_merged_prompt_drops_optional_parts_with_an_empty_column():
    prompt = "{instruction}[[\nInput: {input} ({unit})]]\n[[{note}]]!"
    full = {"instruction": "Do {input}", "input": 0, "unit": "m", "note": None}
    assert merge_columns(prompt, full) == "Do {input}\nInput: 0 (m)\n!"
    assert merge_columns(prompt, {**full, "unit": ""}) == "Do {input}\n!"


def test_to_sharegpt_leaves_out_optional_parts_row_by_row():
    rows = [{"q": "Add", "x": "1 2", "a": "3"}, {"q": "Sing", "x": "", "a": "la"}, {"q": "Wait", "x": None, "a": "ok"}]
    dataset = to_sharegpt(Dataset.from_list(rows), "{q}.[[ Use: {x}.]]", "a")
    assert [turns[0]["value"] for turns in dataset["conversations"]] == ["Add. Use: 1 2.", "Sing.", "Wait."]


def test_to_sharegpt_makes_exchanges_and_longer_conversations():
    rows = [{"q": f"q{i}", "a": i} for i in range(6)]
    dataset = Dataset.from_list(rows)
    single = to_sharegpt(dataset, "Say {q}", "a")
    assert single[2] == {"conversations": [{"from": "human", "value": "Say q2"}, {"from": "gpt", "value": "2"}]}
    longer = to_sharegpt(dataset, "{q}", "a", conversation_extension=3)
    assert len(longer) == 6
    for i, conversation in enumerate(longer["conversations"]):
        assert [turn["from"] for turn in conversation] == ["human", "gpt"] * 3
        assert conversation[0]["value"] == f"q{i}"
        assert all(conversation[k]["value"] == "q" + conversation[k + 1]["value"] for k in (0, 2, 4))
    assert longer[:] == to_sharegpt(dataset, "{q}", "a", conversation_extension=3)[:]
    with pytest.raises(WhetError, match="no column 'w'"):
        to_sharegpt(dataset, "{w}", "a")
    with pytest.raises(WhetError, match="below 1"):
        to_sharegpt(dataset, "{q}", "a", conversation_extension=0)
