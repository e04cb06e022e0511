"""The fingerprint of template and tokenizer: what changes it, what does not, and what a stage says of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from whet.data.fingerprint import check, fingerprint, keep
from whet.errors import WhetError
from whet.models.load import load_tokenizer


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny")


def differing(tokenizer: Any, before: dict[str, str]) -> set[str]:
    return {name for name, digest in fingerprint(tokenizer).items() if digest != before[name]}


def test_padding_and_a_saved_copy_change_nothing(tokenizer: Any, tmp_path: Path) -> None:
    before = fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert not differing(tokenizer, before)
    tokenizer.save_pretrained(tmp_path)
    assert not differing(AutoTokenizer.from_pretrained(tmp_path), before)


def test_each_part_follows_what_it_is_of(tokenizer: Any) -> None:
    """Catches a digest of the vocabulary and the special tokens alone."""
    before = fingerprint(tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = template + " "
    assert differing(tokenizer, before) == {"template"}
    tokenizer.chat_template = None
    assert differing(tokenizer, before) == {"template"}
    tokenizer.chat_template = template
    tokenizer.add_tokens(["<new>"])
    assert differing(tokenizer, before) == {"vocabulary"}


def test_another_tokenizer_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    keep(fingerprint(tokenizer), tmp_path)
    assert check(tokenizer, tmp_path, "the data was made with") == fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(WhetError, match="chat template is not what the data was made with"):
        check(tokenizer, tmp_path, "the data was made with")
