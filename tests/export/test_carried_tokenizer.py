"""The proof of a GGUF file whose tokenizer llama.cpp only comes close to: it is held to what whet tells of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from tests.export import planted
from tests.export.planted import Tuned, contents, rewritten
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.export.gguf_tokenizer.carried import KEY
from whet.export.proof import Proof, prove_adapter, prove_gguf
from whet.export.proof.gguf_file import OWN_TOKENS


def normalizing(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


@pytest.fixture(scope="module")
def tuned(llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:  # noqa: F811
    """Asked a prompt that is not in NFC, which llama.cpp would not put into it."""
    made = planted.tune(tmp_path_factory.mktemp("tuned"), retokenize=normalizing)
    reference = made.reference
    texts = ["Cafe\u0301 de\u0301ja\u0300 vu", *reference.texts[:1]]
    return replace(made, reference=type(reference).of(reference.model, reference.tokenizer, texts))


def proof(tuned: Tuned, path: Path) -> Proof:
    return prove_gguf(tuned.reference, path, "f32", tuned.merged(), threads=1)


def test_other_tokens_are_told_and_no_fault(tuned: Tuned) -> None:
    """Catches an export that can't pass, since a prompt comes out otherwise in llama.cpp; and silence about it."""
    found = proof(tuned, tuned.gguf())
    assert found.passed, found.failed
    (own,) = (check for check in found.checks if check.name == OWN_TOKENS)
    assert own.what.startswith("1 of 2 prompts and 1 other texts become other tokens")


def test_an_adapter_is_asked_with_the_same_tokens(tuned: Tuned) -> None:
    adapter, base, folder = tuned.adapter()
    found = prove_adapter(tuned.reference, adapter, base, folder, threads=1)
    assert found.passed, found.failed


def test_what_no_note_tells_of_is_a_fault(tuned: Tuned, tmp_path: Path) -> None:
    """Catches every difference in llama.cpp put down to the one that is known of."""
    other = rewritten(tuned.gguf(), tmp_path / "other.gguf", {"tokenizer.ggml.pre": "qwen2"})
    (check,) = proof(tuned, other).failed
    assert check.name == OWN_TOKENS
    assert "become tokens that no note tells of" in check.what


def test_another_tokenizer_in_the_file_is_a_fault(tuned: Tuned, tmp_path: Path) -> None:
    """Catches a carried tokenizer that nobody compares: here without its normalizer."""
    tokenizer = AutoTokenizer.from_pretrained(tuned.merged())
    tokenizer.backend_tokenizer.normalizer = None
    other = rewritten(tuned.gguf(), tmp_path / "other.gguf", {KEY: tokenizer.backend_tokenizer.to_str()})
    assert contents(other, KEY) != contents(tuned.gguf(), KEY)
    (check,) = proof(tuned, other).failed
    assert check.name == "tokens"


def test_a_lost_tokenizer_is_a_fault(tuned: Tuned, tmp_path: Path) -> None:
    """Catches a file that leaves all to llama.cpp though whet knows better."""
    lost = rewritten(tuned.gguf(), tmp_path / "lost.gguf", {KEY: ""})
    (check,) = proof(tuned, lost).failed
    assert check.name == "tokens"


def test_a_damaged_tokenizer_is_a_fault(tuned: Tuned, tmp_path: Path) -> None:
    """Catches a proof that ends in an error where it should have failed."""
    damaged = rewritten(tuned.gguf(), tmp_path / "damaged.gguf", {KEY: "{}"})
    (check,) = proof(tuned, damaged).failed
    assert f"{KEY} in the file is no tokenizer" in check.what
