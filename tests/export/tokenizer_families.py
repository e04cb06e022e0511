"""Small tokenizers with the structure of the real ones, trained on Python's own source and on strings of all kinds.

Byte-level ones learn their merges without a pre-tokenizer, so that tokens reach across its cuts and any difference
between two pre-tokenizers shows in the token ids.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from tests.export.tiny_llama import CHAT_TEMPLATE, SPECIAL, corpus
from whet.export.gguf_tokenizer.byte_level import PRE_TOKENIZERS, PreTokenizer, built
from whet.export.gguf_tokenizer.strings import strings

COUNT = 2000  # strings that each is tried on
ROWS = 4200  # more than any of them has tokens
LLAMA_2_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI_3_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>\n"
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}"
)


@functools.cache
def training_texts() -> tuple[str, ...]:
    return (*corpus(), *strings(1000, seed=1))


@functools.cache
def _byte_level_merges() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(training_texts(), trainer)
    return backend.to_str()


def byte_level(pre: PreTokenizer, folder: Path) -> Path:
    """A byte-level tokenizer with this pre-tokenizer, in `folder`."""
    content = json.loads(_byte_level_merges())
    content["model"]["ignore_merges"] = pre.whole_words_first
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = built(pre.steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<a b>", normalized=True)])
    if pre.name == "qwen2":
        backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def sentencepiece_model(user_defined: tuple[str, ...] = ()) -> bytes:
    """A SentencePiece BPE model with byte fallback, as Llama 2 and Gemma have; `user_defined`: pieces of that type."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(training_texts()),
        model_writer=written,
        model_type="bpe",
        vocab_size=2600,
        character_coverage=0.99,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user_defined),
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def _pieces(model: bytes) -> Any:
    parsed = proto.ModelProto()
    parsed.ParseFromString(model)
    return parsed.pieces


def from_model_file(folder: Path, tokenizer_class: str, **config: Any) -> Path:
    """A folder with `tokenizer.model` alone, no tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    settings = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def llama_2(folder: Path) -> Path:
    """Llama 2's: a blank at the start of a text, and none after special tokens."""
    scratch = from_model_file(folder / "model", "LlamaTokenizer", legacy=False, chat_template=LLAMA_2_TEMPLATE)
    AutoTokenizer.from_pretrained(scratch).save_pretrained(folder)
    return folder


def phi_3(folder: Path) -> Path:
    """Phi-3's: a blank before every piece of text by the normalizer, and tokens that swallow the blanks after them."""
    vocab = {piece.piece: index for index, piece in enumerate(_pieces(sentencepiece_model()))}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=generate_merges(vocab), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "<|endoftext|>"])
    backend.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    names = ("assistant", "placeholder1", "system", "end", "user")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", rstrip=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>"
    )
    tokenizer.chat_template = PHI_3_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def gemma(folder: Path, longest_first: bool = False) -> Path:
    """Gemma's: no blank before a text, runs of newlines, tabs and blanks and some markup as tokens of their own.

    longest_first: runs rank by length, as transformers makes of pieces with equal scores, and not by token.
    """
    runs = [char * n for char, first in (("\n", 1), ("▁", 2), ("\t", 2)) for n in range(first, 12)]
    defined = ["<2mass>", "[@BOS@]", "<unused0>", *runs, "<table>", "</table>", "<h1>"]
    pieces = _pieces(sentencepiece_model(tuple(defined)))
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {text: pieces[i].score for text, i in vocab.items()} if longest_first else None)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>"])
    backend.add_tokens([AddedToken(text, normalized=False) for text in defined])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = GEMMA_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    **{pre.name: functools.partial(byte_level, pre) for pre in PRE_TOKENIZERS},
    "llama 2": llama_2,
    "mistral": lambda folder: from_model_file(folder, "TokenizersBackend"),
    "mistral, legacy": lambda folder: from_model_file(
        folder, "LlamaTokenizer", legacy=True, chat_template=LLAMA_2_TEMPLATE
    ),
    "phi-3": phi_3,
    "gemma": gemma,
    "gemma, longest runs first": functools.partial(gemma, longest_first=True),
}
"""What writes each family into a folder, and returns the folder."""


def texts(tokenizer: Any) -> tuple[str, ...]:
    """The strings that a family is tried on: those of whet, with its own special tokens in a third of them."""
    contents = (token.content for token in tokenizer.added_tokens_decoder.values())
    return strings(COUNT, special=tuple(content for content in contents if content.strip() and "▁" not in content))
