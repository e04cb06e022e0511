"""What several test folders share: a tiny Llama with random weights, and its tokenizer, saved in a folder."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import pytest

from tests.network import no_connections  # noqa: F401 (a fixture of every test)
from tests.road import as_loud_as_before, here  # noqa: F401

LONG = (
    *("test_killed.py", "test_worked_example.py", "test_no_network.py", "test_compiled.py", "test_readme.py"),
    *("test_resume.py", "test_finetune.py", "test_evaluated_runs.py", "test_prep.py", "test_pipeline.py"),
    *("test_trainers.py", "test_watch.py", "test_optimizer.py", "test_gguf.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long go first: a process takes a file whole, and one begun last would be waited for."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """One thread, and what the libraries made as they were imported is for good: a collection would look through its
    millions of objects again, and the trainer collects after each training.
    """
    import torch  # here and below: the process that hands out the tests needs no more than this file

    torch.set_num_threads(1)  # tiny models: threads would only wait for each other, and for other test processes
    gc.collect()
    gc.freeze()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama (256 wide: a block of GGUF's k-quants), fp32, and a chat template in ChatML."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = _byte_level_bpe()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _byte_level_bpe() -> Any:
    """A PreTrainedTokenizerFast of 500 tokens, trained on a text that every Python has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([module.__doc__ or "" for module in (argparse, json)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    return tokenizer
