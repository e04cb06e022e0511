"""The tokenizer of `builtin:tiny`, trained on its corpus, and the corpus as token ids.

    python -m tiny.tokens CORPUS OUT

A byte-level BPE of 8,192 tokens with GPT-2's pre-tokenization, which llama.cpp knows by that name; conversations are
rendered in ChatML. Writes the tokenizer and, for each JSON-lines file of the corpus, NAME.npy: uint16 ids [N], every
document ended by <|endoftext|>.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from whet.data.chat_templates import get_chat_template

VOCABULARY = 8192
END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>"]


def texts(path: Path) -> Iterator[str]:
    """The plain text of each row, without any template: what the vocabulary is learned from."""
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        yield row["text"] if "text" in row else "\n".join(message["content"] for message in row["messages"])


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(corpus), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token="<|pad|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    return get_chat_template(tokenizer, "chatml")


def encode(path: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All rows of a JSON-lines file as one array of ids."""
    ids: list[int] = []
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    for line in path.open(encoding="utf-8"):
        row = json.loads(line)
        text = row["text"] if "text" in row else tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    return np.array(ids, dtype=np.uint16)


def main(corpus: Path, out: Path) -> None:
    tokenizer = train_tokenizer(corpus / "train.jsonl")
    tokenizer.save_pretrained(out)
    for name in ("train", "heldout"):
        ids = encode(corpus / f"{name}.jsonl", tokenizer)
        np.save(out / f"{name}.npy", ids)
        print(f"{name}: {len(ids):,} tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
