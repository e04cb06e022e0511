"""2,000 strings become the tokens of transformers and strings again, for every family of tokenizers.

In each family llama.cpp is asked for its own tokens too. Where its tokenizer only comes close, the file carries
tokenizer.json, by which whet asks it with token ids; what its own does then is told exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.export import tokenizer_families as families
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export import llama_cpp as runner
from whet.export.gguf_tokenizer import GGUFTokenizer, load_tokenizer, read_tokenizer
from whet.export.gguf_tokenizer.byte_level import PRE_TOKENIZERS
from whet.export.gguf_tokenizer.carried import Carried
from whet.export.gguf_tokenizer.llama_cpp_cut import llama_cpp_cut

FAMILIES = families.FAMILIES
CARRIED = {  # what each file's first note says; files of other families carry nothing
    "qwen2": "normalizes text to NFC and llama.cpp does not",
    "deepseek-coder": "cuts blanks beyond ASCII at other places",
    "tekken": "cuts words with combining marks",
    "gpt-4o": "cuts words with combining marks",
    "llama 2": "puts a blank at the start of a text, and llama.cpp puts none: chats come out the same",
    "mistral, legacy": "puts no blank at the start of a text that begins with a blank or between",
    "phi-3": "drops only ASCII blanks",
}


@dataclass
class Cut:
    """A family's tokenizer, what whet made of it, what llama.cpp makes of `texts`, and of `expected` again."""

    tokenizer: Any
    written: GGUFTokenizer
    texts: tuple[str, ...]
    expected: list[list[int]]
    found: list[list[int]]
    again: list[str]


@pytest.fixture(scope="module")
def cuts(llama_cpp, tmp_path_factory) -> dict[str, Cut]:  # noqa: F811
    """Every family, with one process of llama.cpp for all."""
    root = tmp_path_factory.mktemp("families")
    made = {name: make(root / name) for name, make in FAMILIES.items()}
    loaded = {name: load_tokenizer(folder) for name, folder in made.items()}
    written = {name: read_tokenizer(folder, families.ROWS) for name, folder in made.items()}
    texts = {name: families.texts(tokenizer) for name, tokenizer in loaded.items()}
    expected = {
        name: tokenizer(list(texts[name]), add_special_tokens=False)["input_ids"] for name, tokenizer in loaded.items()
    }
    files = {name: folder / "vocabulary.gguf" for name, folder in made.items()}
    for name, file in files.items():
        written[name].write_vocabulary(file)
    found = runner.tokenize_each([(files[name], texts[name]) for name in made])
    again = runner.detokenize_each([(files[name], expected[name]) for name in made])
    return {
        name: Cut(loaded[name], written[name], texts[name], expected[name], tokens, back)
        for name, tokens, back in zip(made, found, again, strict=True)
    }


def _other(ours: list[Any], theirs: list[Any], texts: tuple[str, ...]) -> list[str]:
    assert len(texts) == families.COUNT
    return [text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other]


@pytest.mark.parametrize("name", FAMILIES)
def test_strings_become_the_tokens_of_transformers(name, cuts):
    """Catches a pre-tokenizer under the wrong name, scores in the wrong order, tokens of the wrong type, a lost or
    doubled blank; and a file that carries its tokenizer though llama.cpp's own does the same, or that should and does
    not."""
    cut = cuts[name]
    own = cut.found
    if name in CARRIED:
        assert _other(cut.expected, own, cut.texts) != []
        own = Carried(cut.written.carried, families.ROWS, name).cut(cut.texts)
    else:
        assert cut.written.carried is None
    assert _other(cut.expected, own, cut.texts) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_become_the_strings_of_transformers(name, cuts):
    """Catches llama.cpp's clean-up, which drops blanks before punctuation, and a blank too many at the start."""
    cut = cuts[name]
    expected = [
        cut.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in cut.expected
    ]
    assert _other(expected, cut.again, cut.texts) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_what_llama_cpp_does_is_told(name, cuts):
    """Catches a difference in llama.cpp that whet does not know of, on any string of any family."""
    cut = cuts[name]
    assert _other(llama_cpp_cut(cut.written, cut.texts), cut.found, cut.texts) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_what_llama_cpp_does_otherwise_is_noted(name, cuts):
    """Catches a difference that whet knows of and keeps to itself, and a note about nothing."""
    notes = cuts[name].written.notes
    assert [CARRIED[name] in notes[0], "carries tokenizer.json" in notes[1]] if name in CARRIED else notes == []
    assert len(notes) == 2 * (name in CARRIED)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=[pre.name for pre in PRE_TOKENIZERS])
def test_byte_level_gets_its_name(pre, cuts):
    written = cuts[pre.name].written
    assert (written.model, written.pre, written.add_space_prefix) == ("gpt2", pre.name, None)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("llama 2", False), ("mistral, legacy", True), ("phi-3", True), ("gemma", False), ("mistral", True)],
)
def test_a_blank_goes_before_a_text_where_chats_have_it(name, prefix, cuts):
    written = cuts[name].written
    assert (written.model, written.add_space_prefix) == ("llama", prefix)


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


@pytest.mark.parametrize(
    ("content", "rows", "message"),
    [("{}", families.ROWS, "is no tokenizer"), (None, 100, r"has the token id 2\d+, and the model has 100 tokens")],
)
def test_a_tokenizer_that_cannot_be_the_models_is_refused(content, rows, message, cuts):
    """Catches a damaged tokenizer.json in a file, and that of another model, found at the first prompt only."""
    with pytest.raises(WhetError, match=message):
        Carried(content or cuts["llama 2"].written.carried, rows, "model.gguf")


def test_a_truncating_tokenizer_does_not_cut_prompts_short(tmp_path):
    """Catches settings for batches, which training saves with a tokenizer, in the file or from another's file."""
    folder = FAMILIES["qwen2"](tmp_path)
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    text = "a text of more than three tokens"
    for content in (read_tokenizer(folder, families.ROWS).carried, tokenizer.backend_tokenizer.to_str()):
        (ids,) = Carried(content, families.ROWS, "").cut([text])
        assert 3 < len(ids) < 64
