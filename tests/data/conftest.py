"""A small byte-level BPE tokenizer that knows the special tokens of every named template, and conversations for it."""

from __future__ import annotations

import copy
from functools import cache
from itertools import groupby

import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from whet.data.chat_formats import ChatFormat
from whet.data.chat_templates import get_chat_template
from whet.data.labels import IGNORE

SPECIAL_TOKENS = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.\n\nWhat is the capital of France? Paris is the capital of France.",
    "### Instruction:\nName three colours.\n\n### Response:\nRed, green and blue.\n\n",
    "user\nassistant\nsystem\nmodel\ntool\n\n\n<think>\n\n</think>\n\nUSER: hello ASSISTANT: hello there",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
] * 20


def build_tokenizer(*, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]


@cache
def named(name: str, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    return get_chat_template(build_tokenizer(trim_offsets=trim_offsets), name)


def labelled_runs(tokenizer: PreTrainedTokenizerFast, input_ids: list[int], labels: list[int]) -> list[str]:
    """The text of each unbroken run of labels; every label must be the token it stands at."""
    assert len(labels) == len(input_ids)
    assert all(label in (IGNORE, token) for token, label in zip(input_ids, labels, strict=True))
    runs = groupby(labels, key=lambda label: label != IGNORE)
    return [tokenizer.decode(list(run), clean_up_tokenization_spaces=False) for learn, run in runs if learn]


def written_by_model(chat_format: ChatFormat, content: str) -> str:
    stop = chat_format.end_token or "</s>"
    return chat_format.lead + content + stop


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Co", "Z"]), min_size=1, max_size=6)
GAPS = st.sampled_from([" ", "\n", "\n\n", "  ", "\t", "\u2028"])
CONTENT = st.lists(st.one_of(WORDS, st.tuples(WORDS, GAPS, WORDS).map("".join)), min_size=1, max_size=4).map(" ".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    system = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    turns = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    pairs = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in turns]
    return system + [message for pair in pairs for message in pair]


@pytest.fixture(scope="session")
def base_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def tokenizer(base_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer of the test's own, without a chat template."""
    return copy.deepcopy(base_tokenizer)
