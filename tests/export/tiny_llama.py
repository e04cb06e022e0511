"""Tiny random Llamas with real byte-level BPE tokenizers, trained on Python's own docstrings."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import pathlib
import typing
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "<|im_end|>", "<pad>", "<|im_start|>"]

# Strings that tell pre-tokenizers apart: contractions, numbers, runs of blanks, scripts, symbols, special tokens.
STRINGS = [
    "Hello world",
    " leading and trailing  ",
    "tabs\tand\n\nnew\r\nlines   \n   indented\n\t\tx",
    "    four spaces, then        eight",
    "it's, we'll, I'VE, don't, 'tis",
    "0 12 345 6789 3.14159 1,000,000 0x7f 1e-5",
    "naïve café Ünïcödé İstanbul straße",
    "日本語のテキスト 中文字符 한국어",
    "русский عربي עברית हिन्दी ไทย",
    "🙂👩‍👩‍👧‍👦 ½ ² Ⅻ ٣٤ ﬁ",
    "camelCaseWord HTTPServer snake_case __init__ SHOUT",
    "a+b==c; x->y && !z || (q<=r) /* comment */ //path/to\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>text right after<|im_end|>",
    "almost <|im_start special |> <s",
    "<tool>call</tool> and <tool >",
    "\n",
    " ",
    "…—“quoted”\u2018s",
    "\u00a0nbsp\u2003em space\u200bzero width",
]


@functools.cache
def corpus() -> tuple[str, ...]:
    modules = (argparse, functools, json, logging, pathlib, typing)
    texts = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules]
    return tuple(line for text in texts for line in text.splitlines(keepends=True)[:250])


def split_by(regex: str) -> pre_tokenizers.PreTokenizer:
    """The usual shape of a byte-level pre-tokenizer with a regex of its own."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level_tokenizer(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, ignore_merges: bool = False, across: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with GPT-2's pre-tokenizer or another.

    across: learn merges without a pre-tokenizer, over STRINGS too, so that many tokens reach across its cuts and any
    difference between two pre-tokenizers shows in the token ids.
    """
    whole_lines = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = whole_lines if across else cut
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2400 if across else 600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*corpus(), *(STRINGS * 20 if across else [])], trainer)
    backend.pre_tokenizer = cut
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: object) -> Path:
    """A random Llama of hidden size 256 saved to `folder`. Its weights are wide, so that logits lie well apart."""
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer) + 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.08,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:  # norms start as ones and biases as zeros, which would hide their absence
                weight.copy_(torch.rand_like(weight) * 0.5 + (0.75 if "norm" in name else -0.25))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
