"""What whet makes of a tokenizer for GGUF: names, types, ids, templates, notes; and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGUFReader, TokenType
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.export.tiny_llama import byte_level_tokenizer, split_by
from whet.errors import WhetError
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.gguf_tokenizer.added import overlaps
from whet.export.gguf_tokenizer.byte_fallback import scores
from whet.export.gguf_tokenizer.byte_level import PRE_TOKENIZERS, built
from whet.export.gguf_tokenizer.strings import strings

LLAMA_3 = next(pre for pre in PRE_TOKENIZERS if pre.name == "llama-bpe")


@pytest.mark.parametrize(("ignore_merges", "name"), [(True, "llama-bpe"), (False, "dbrx")])
def test_one_regex_has_two_names(ignore_merges, name, tmp_path):
    """Catches Phi-4's tokenizer under Llama 3's name: the regex is the same, but merges come before whole words."""
    tokenizer = byte_level_tokenizer(built(LLAMA_3.steps), ignore_merges)
    assert read_tokenizer(_saved(tokenizer, tmp_path), 1000).pre == name


def test_another_spelling_is_known_by_what_it_does(tmp_path):
    """Catches a refusal of Llama 3's regex with its parts written otherwise; the note says how it was recognized."""
    other = LLAMA_3.steps[0][1].replace(r"\p{N}{1,3}", r"(?:\p{N}{1,3})")
    result = read_tokenizer(_saved(byte_level_tokenizer(split_by(other)), tmp_path), 1000)
    assert result.pre == "dbrx"
    assert any("spelled otherwise" in note and "2,000 strings" in note for note in result.notes)


def test_the_strings_tell_all_pre_tokenizers_apart():
    """Catches strings so tame that a tokenizer could get another one's name by them; 300 of the 2,000 are enough."""
    cuts: dict[str, set[object]] = {}
    for pre in PRE_TOKENIZERS:
        pre_tokenizer = built(pre.steps)
        cut = str([pre_tokenizer.pre_tokenize_str(text) for text in strings(300)])
        cuts.setdefault(cut, set()).add(pre.steps)
    assert all(len(steps) == 1 for steps in cuts.values())


def test_strings_are_what_they_say():
    """Catches a repeated string, a special token that is in none, and a generator that changes from run to run."""
    texts = strings(500, special=("<s>",))
    assert len(set(texts)) == 500
    assert 50 < sum("<s>" in text for text in texts) < 250
    assert texts == strings.__wrapped__(500, special=("<s>",))
    assert not any("▁" in text for text in strings())


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


def test_stop_tokens_that_llama_cpp_knows_by_their_text_leave_room_for_others(tmp_path):
    """Catches <|endoftext|>, which always ends an answer there, in the place that another stop token needs."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<stop>", "<halt>"]})
    folder = _saved(tokenizer, tmp_path)
    known, stop, halt = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<stop>", "<halt>"])
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{known}, {stop}, {halt}]}}')
    result = read_tokenizer(folder, 1000)
    assert (result.ids["eot"], result.ids["eom"]) == (stop, halt)
    assert result.notes == []


def test_added_tokens_get_types_and_notes(tmp_path):
    """Catches a special token that is not parsed, and properties that get lost without a word."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True), AddedToken("w", single_word=True)]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sp>"]})
    result = read_tokenizer(_saved(tokenizer, tmp_path), 1000)
    kinds = dict(zip(result.tokens, result.types, strict=True))
    assert (kinds["<sp>"], kinds["<l>"], kinds["a"]) == (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL)
    assert kinds["[PAD999]"] is TokenType.UNUSED
    assert [note.split("'")[1] for note in result.notes if "strip" in note or "single_word" in note] == [
        "<l>",
        "w",
        "<r>",
    ]


def test_overlapping_added_tokens():
    """Catches pairs that llama.cpp cuts out in another order, and runs of one character, which it does not."""
    assert overlaps(["<a>", "><b>", "[c]"]) == [("<a>", "><b>")]
    assert overlaps(["\n\n", "\n\n\n", "<|x|>", "<|y|>"]) == []


def test_named_templates_are_all_written_in_order(tmp_path):
    """Catches a lost tool template, and names in an order that changes the file from run to run."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"tool_use": "T", "default": "D", "rag": "R"}
    read_tokenizer(_saved(tokenizer, tmp_path), 1000).write_vocabulary(tmp_path / "v.gguf")
    fields = GGUFReader(tmp_path / "v.gguf").fields
    assert fields["tokenizer.chat_templates"].contents() == ["rag", "tool_use"]
    names = ("", ".rag", ".tool_use")
    assert [fields[f"tokenizer.chat_template{name}"].contents() for name in names] == ["D", "R", "T"]


def test_a_token_twice_is_refused(tmp_path):
    """llama.cpp does not load a vocabulary that has a text twice; here a token is called as padding rows are."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["[PAD999]"])
    with pytest.raises(WhetError, match=r"2 tokens have the text '\[PAD999\]'"):
        read_tokenizer(_saved(tokenizer, tmp_path), 1000)


# SentencePiece's kind


def _byte_fallback(merges: list[tuple[str, str]], *more: str, bytes_: int = 256) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(bytes_)), "▁", *more]
    tokens += [left + right for left, right in merges]
    vocab = {text: index for index, text in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_tokens_of_sentencepiece_have_their_types(tmp_path):
    result = read_tokenizer(_saved(_byte_fallback([("a", "b")], "a", "b"), tmp_path), 400)
    assert result.types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE]
    assert result.scores is not None
    assert result.scores[result.tokens.index("ab")] == -1


def test_a_missing_byte_token_is_refused(tmp_path):
    """llama.cpp ends the process at such a byte."""
    with pytest.raises(WhetError, match="no token for 56 of the 256 bytes, the first <0xC8>"):
        read_tokenizer(_saved(_byte_fallback([("a", "b")], "a", "b", bytes_=200), tmp_path), 400)


def test_two_tokens_that_only_llama_cpp_would_join_are_refused(tmp_path):
    """llama.cpp merges any two tokens whose joint text is a token; a trained BPE knows one split of each."""
    tokenizer = _byte_fallback([("a", "b"), ("ab", "c")], "a", "b", "c", "bc")
    with pytest.raises(WhetError, match=r"merge 'b' and 'c'.* no such merge"):
        read_tokenizer(_saved(tokenizer, tmp_path), 400)


def test_merges_that_no_score_can_stand_for_are_refused(tmp_path):
    tokenizer = _byte_fallback([("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")], "a", "b", "c", "d")
    with pytest.raises(WhetError, match="do not follow each other"):
        read_tokenizer(_saved(tokenizer, tmp_path), 400)


def test_a_normalizer_that_does_more_is_refused(tmp_path):
    """Catches SentencePiece's NFKC, or blanks removed, passed over in silence."""
    tokenizer = _byte_fallback([("a", "b")], "a", "b")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    with pytest.raises(WhetError, match="no equal of this byte-fallback tokenizer's normalizer"):
        read_tokenizer(_saved(tokenizer, tmp_path), 400)


LETTERS = "abc"
_merges = st.lists(st.tuples(*[st.text(LETTERS, min_size=1, max_size=3)] * 2), unique=True, max_size=8)


@given(_merges, st.lists(st.text(LETTERS, max_size=10), min_size=5, max_size=5))
def test_scores_do_what_merges_do(merges, texts):
    """Catches scores accepted for merges that they cannot stand for.

    Tokens that begin as they end are left out: two of them can overlap in a text, and which comes first then is left
    to the order of the splits, which real vocabularies have in the order that makes no difference.
    """
    joined = [left + right for left, right in merges]
    assume(not any(text[:n] == text[-n:] for text in joined for n in range(1, len(text))))
    parts = [part for merge in merges for part in merge]
    vocab = {text: index for index, text in enumerate(dict.fromkeys([*LETTERS, *parts, *joined]))}
    try:
        found = scores({"vocab": vocab, "merges": merges}, set(), "here")
    except WhetError:
        return
    bpe = models.BPE(vocab=vocab, merges=merges)
    for text in texts:
        assert [token.value for token in bpe.tokenize(text)] == _as_llama_cpp(text, vocab, found)


def _as_llama_cpp(text: str, vocab: dict[str, int], found: dict[str, float]) -> list[str]:
    symbols = list(text)
    while True:
        pairs = [(-found.get(a + b, -1e9), i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in vocab]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
