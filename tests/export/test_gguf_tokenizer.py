"""llama.cpp cuts text into exactly the tokens that transformers does, for every pre-tokenizer whet knows."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.export.tiny_llama import STRINGS, byte_level_tokenizer, corpus, save_llama, split_by
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export import llama_cpp as runner
from whet.export.gguf import write_gguf
from whet.export.gguf_tokenizer import MARKS_CUT_DIFFERENTLY, PRE_TOKENIZERS, read_tokenizer

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}


def _pre_tokenizer(steps) -> pre_tokenizers.PreTokenizer:
    parts = []
    for kind, what in steps:
        if kind == "Split":
            parts.append(pre_tokenizers.Split(Regex(what), behavior="isolated", invert=False))
        elif kind == "Digits":
            parts.append(pre_tokenizers.Digits(individual_digits=what))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=what))
    return pre_tokenizers.Sequence(parts)


def _check_tokens(folder: Path, strings: list[str]) -> None:
    report = write_gguf(folder, folder / "m.gguf", "f16")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in strings]
    assert dict(zip(strings, runner.tokenize(report.path, strings), strict=True)) == dict(
        zip(strings, expected, strict=True)
    )


@pytest.mark.parametrize(("steps", "named"), PRE_TOKENIZERS.items(), ids=[name for name, _ in PRE_TOKENIZERS.values()])
@pytest.mark.usefixtures("llama_cpp")
def test_tokens_are_the_same(steps, named, tmp_path):
    """Catches a pre-tokenizer that bears the wrong name, and special tokens of the wrong type."""
    name, ignore_merges = named
    tokenizer = byte_level_tokenizer(_pre_tokenizer(steps), ignore_merges, across=True)
    folder = save_llama(tmp_path, tokenizer, **SMALL)
    result = read_tokenizer(folder, len(tokenizer))
    assert result.pre == name
    inexact = name in MARKS_CUT_DIFFERENTLY
    assert inexact == any("combining marks" in note for note in result.notes)
    _check_tokens(folder, [text for text in STRINGS if not (inexact and _has_marks(text))])


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(char).startswith("M") for char in text)


@pytest.mark.usefixtures("llama_cpp")
def test_ignore_merges_may_differ_where_it_changes_nothing(tmp_path):
    """A tokenizer trained on Llama 3's regex lacks ignore_merges, but its merges lead to every token anyway."""
    steps = next(steps for steps, (name, _) in PRE_TOKENIZERS.items() if name == "llama-bpe")
    folder = save_llama(tmp_path, byte_level_tokenizer(_pre_tokenizer(steps), ignore_merges=False), **SMALL)
    _check_tokens(folder, STRINGS)


def test_ignore_merges_that_matters_is_refused(tmp_path):
    """The word "abc" is a token, but merges stop at "ab" and "c": GPT-2's way must not be written for it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, "ab", "abc", "<s>", "<|im_end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(tmp_path)
    with pytest.raises(WhetError, match=r"do not lead to the token 'abc'"):
        read_tokenizer(tmp_path, len(vocab))


def test_unknown_pre_tokenizer_is_named(tmp_path):
    byte_level_tokenizer(split_by(r"\w+|\W+")).save_pretrained(tmp_path)
    with pytest.raises(WhetError, match=r"Split \\w\+\|\\W\+"):
        read_tokenizer(tmp_path, 1000)


def test_prefix_space_of_byte_level_is_refused(tmp_path):
    """GPT-2's tokenizer with add_prefix_space cuts differently, under the same regex."""
    byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)).save_pretrained(tmp_path)
    with pytest.raises(WhetError, match="add_prefix_space"):
        read_tokenizer(tmp_path, 1000)


def test_nfc_is_noted_and_other_normalizers_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(tmp_path / "nfc")
    assert any("NFC" in note for note in read_tokenizer(tmp_path / "nfc", 1000).notes)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "lower")
    with pytest.raises(WhetError, match="Lowercase"):
        read_tokenizer(tmp_path / "lower", 1000)


def test_bos_is_added_where_the_tokenizer_adds_it(tmp_path):
    tokenizer = byte_level_tokenizer()
    assert not read_tokenizer(_saved(tokenizer, tmp_path / "without"), 1000).add_bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    result = read_tokenizer(_saved(tokenizer, tmp_path / "with"), 1000)
    assert (result.add_bos, result.add_eos) == (True, False)


def test_odd_tokens_around_text_are_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    with pytest.raises(WhetError, match="adds more than BOS and EOS"):
        read_tokenizer(_saved(tokenizer, tmp_path), 1000)


def test_further_stop_tokens_become_eot_and_eom(tmp_path):
    """Llama 3's generation_config lists several tokens that end an answer."""
    tokenizer = byte_level_tokenizer()
    folder = _saved(tokenizer, tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [0, {tokenizer.eos_token_id}, 2, 3]}}')
    result = read_tokenizer(folder, 1000)
    assert (result.ids["eos"], result.ids["eot"], result.ids["eom"]) == (tokenizer.eos_token_id, 0, 2)
    assert any("stop token '<|im_start|>'" in note for note in result.notes)


def test_missing_eos_is_refused(tmp_path):
    """llama.cpp would take token 11 for the end of the text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer().backend_tokenizer)
    with pytest.raises(WhetError, match="no eos token"):
        read_tokenizer(_saved(tokenizer, tmp_path), 1000)


def test_vocabulary_larger_than_embedding_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    with pytest.raises(WhetError, match=rf"has {len(tokenizer)} tokens but the model's embedding has 500 rows"):
        read_tokenizer(_saved(tokenizer, tmp_path), 500)


def test_tokenizer_that_is_no_bpe_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    with pytest.raises(WhetError, match="WordLevel"):
        read_tokenizer(_saved(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>"), tmp_path), 10)


def test_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(WhetError, match=r"tokenizer\.json: the file is missing"):
        read_tokenizer(tmp_path, 10)


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def _sentencepiece_kind(every_split: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: byte fallback, "▁" for blanks, merges of every split of a token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus()[:400], trainer)
    vocab = backend.get_vocab()
    merges = []
    for token in sorted((t for t in vocab if t not in special), key=vocab.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = sorted(
            (cut for cut in cuts if cut[0] in vocab and cut[1] in vocab), key=lambda c: [vocab[p] for p in c]
        )
        merges += splits if every_split else splits[:1]
    trained = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = backend.normalizer
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.usefixtures("llama_cpp")
def test_sentencepiece_kind_gives_the_same_tokens(tmp_path):
    """Catches scores in the wrong order, byte tokens of the wrong type, a lost or doubled space prefix."""
    folder = save_llama(tmp_path, _sentencepiece_kind(), **SMALL)
    _check_tokens(folder, [*STRINGS, "<s>a</s>b", "x</s> y"])
    fields = gguf.GGUFReader(folder / "m.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]


def test_sentencepiece_kind_without_every_split_is_refused(tmp_path):
    """llama.cpp merges any two tokens whose joint text is a token; a trained BPE knows one split of each."""
    with pytest.raises(WhetError, match="no such merge"):
        read_tokenizer(_saved(_sentencepiece_kind(every_split=False), tmp_path), 600)
