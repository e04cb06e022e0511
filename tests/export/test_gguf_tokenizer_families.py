"""llama.cpp cuts 2,000 strings into exactly the tokens that transformers does, for every family of tokenizers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.export import tokenizer_families as families
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.export import llama_cpp as runner
from whet.export.gguf_tokenizer import GGUFTokenizer, load_tokenizer, read_tokenizer
from whet.export.gguf_tokenizer.byte_level import PRE_TOKENIZERS, built
from whet.export.gguf_tokenizer.round_trip import differences
from whet.export.gguf_tokenizer.strings import strings

COUNT = 2000
SENTENCEPIECE = {
    "llama 2": families.llama_2,
    "mistral, legacy": lambda folder: families.from_model_file(
        folder, "LlamaTokenizer", legacy=True, chat_template=families.LLAMA_2_TEMPLATE
    ),
    "phi-3": families.phi_3,
    "gemma": families.gemma,
    "gemma, longest runs first": lambda folder: families.gemma(folder, longest_first=True),
    "tokenizer.model alone": lambda folder: families.from_model_file(folder, "TokenizersBackend"),
}


@dataclass
class Cut:
    """A family's tokenizer, what whet made of it, and what llama.cpp then makes of `texts`."""

    folder: Path
    tokenizer: Any
    written: GGUFTokenizer
    texts: list[str]
    found: list[list[int]]


def _special(tokenizer: Any) -> tuple[str, ...]:
    contents = (token.content for token in tokenizer.added_tokens_decoder.values())
    return tuple(content for content in contents if content.strip() and "▁" not in content)


def _texts(name: str, tokenizer: Any) -> list[str]:
    """2,000 strings that a tokenizer of this family and llama.cpp can cut alike; of the others there is a note."""
    special = _special(tokenizer)
    texts = list(strings(2 * COUNT, special=special))
    between = re.compile("|".join(map(re.escape, special)))
    if name == "llama 2":  # a text begins with a special token, as every chat does
        texts = ["<s>" + text for text in texts]
    if name == "mistral, legacy":
        texts = [text for text in texts if not any(piece.startswith(" ") for piece in between.split(text))]
    if name == "phi-3":
        texts = [t for t in texts if not any(re.match(r"[ \t-\r]*[^\x00-\x7f\S]", piece) for piece in between.split(t))]
    if (normalizer := tokenizer.backend_tokenizer.normalizer) and name == "qwen2":
        texts = list(dict.fromkeys(map(normalizer.normalize_str, texts)))
    return texts[:COUNT]


@pytest.fixture(scope="module")
def cuts(llama_cpp, tmp_path_factory) -> dict[str, Cut]:  # noqa: F811
    """Every family, with one process of llama.cpp for all."""
    root, made = tmp_path_factory.mktemp("families"), {}
    for pre in PRE_TOKENIZERS:
        made[pre.name] = families.byte_level(pre, root / pre.name)
    for name, make in SENTENCEPIECE.items():
        made[name] = make(root / name)
    loaded = {name: load_tokenizer(folder) for name, folder in made.items()}
    written = {name: read_tokenizer(folder, families.ROWS) for name, folder in made.items()}
    texts = {name: _texts(name, tokenizer) for name, tokenizer in loaded.items()}
    for name, folder in made.items():
        written[name].write_vocabulary(folder / "vocabulary.gguf")
    found = runner.tokenize_each([(made[name] / "vocabulary.gguf", texts[name]) for name in made])
    return {
        name: Cut(made[name], loaded[name], written[name], texts[name], tokens)
        for name, tokens in zip(made, found, strict=True)
    }


def _expected(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def _assert_same(cut: Cut, expected: list[list[int]]) -> None:
    assert len(cut.texts) == COUNT
    other = [text for text, ours, theirs in zip(cut.texts, expected, cut.found, strict=True) if ours != theirs]
    assert other == []


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=[pre.name for pre in PRE_TOKENIZERS])
def test_byte_level(pre, cuts):
    """Catches a pre-tokenizer that bears the wrong name, and special tokens of the wrong type.

    Where llama.cpp only comes close, it must follow the steps that whet says it follows, on every string.
    """
    cut = cuts[pre.name]
    assert (cut.written.model, cut.written.pre) == ("gpt2", pre.name)
    assert bool(pre.followed) == any("at other places" in note for note in cut.written.notes)
    if pre.followed:
        own = _expected(cut.tokenizer, cut.texts)
        cut.tokenizer.backend_tokenizer.pre_tokenizer = built(pre.followed)
        assert _expected(cut.tokenizer, cut.texts) != own
    _assert_same(cut, _expected(cut.tokenizer, cut.texts))


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name, cuts):
    """Catches scores in the wrong order, byte tokens of the wrong type, a lost or doubled blank before a text."""
    cut = cuts[name]
    assert cut.written.model == "llama"
    _assert_same(cut, _expected(cut.tokenizer, cut.texts))


@pytest.mark.parametrize(
    ("name", "prefix", "note"),
    [
        ("llama 2", False, "puts a blank at the start of a text, and llama.cpp puts none: chats come out the same"),
        ("mistral, legacy", True, "puts no blank at the start of a text that begins with a blank or between"),
        ("phi-3", True, "drops only ASCII blanks"),
        ("gemma", False, None),
        ("gemma, longest runs first", False, None),
        ("tokenizer.model alone", True, None),
    ],
)
def test_what_llama_cpp_does_otherwise_is_noted(name, prefix, note, cuts):
    """Catches a difference that whet knows of and keeps to itself, and a note about nothing."""
    written = cuts[name].written
    assert written.add_space_prefix is prefix
    assert len(written.notes) == (note is not None)
    assert note is None or note in written.notes[0]


def test_blanks_go_with_phi_3_tokens_by_the_models_name(cuts):
    """Catches a Phi-3 named otherwise, which llama.cpp would not strip, and another model that it would."""
    assert cuts["phi-3"].written.model_name("my tune") == "my tune (phi-3)"
    assert cuts["phi-3"].written.model_name("Phi3-mini") == "Phi3-mini"
    assert cuts["gemma"].written.model_name("better-than-phi3") == "better-than-phi 3"


def test_runs_of_blanks_come_out_as_blanks(cuts):
    """Catches Gemma's runs of "▁" kept as added tokens, which llama.cpp writes out as they stand."""
    written = cuts["gemma"].written
    kinds = dict(zip(written.tokens, written.types, strict=True))
    assert kinds["▁▁▁"].name == "NORMAL"
    assert kinds["\n\n"].name == kinds["<table>"].name == "USER_DEFINED"
    assert kinds["<start_of_turn>"].name == "CONTROL"


def test_differences_names_the_texts(cuts):
    """Catches a comparison that passes whatever llama.cpp says."""
    cut = cuts["llama 2"]
    (found,) = differences(cut.tokenizer, cut.folder / "vocabulary.gguf", ["<s>same", "other"])
    assert found.text == "other"
    assert cut.tokenizer.convert_ids_to_tokens(found.transformers)[0].startswith("▁")
    assert not cut.tokenizer.convert_ids_to_tokens(found.llama_cpp)[0].startswith("▁")
