"""Examples become rows of token ids in a file, window by window."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import named
from whet.data.chat_templates import get_chat_template
from whet.data.examples import Conversation, Preference, Text
from whet.data.template import IGNORE, tokenize_conversation
from whet.data.tokens import Counts, read_rows, write_tokens
from whet.errors import WhetError, WhetErrors
from whet.models.load import load_tokenizer

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao"},
]
LONG = [{"role": "user", "content": "word " * 50}, CHAT[1]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return get_chat_template(load_tokenizer("builtin:tiny"), "chatml")


def conversation(messages: list[dict[str, Any]], line: int = 1) -> Conversation:
    return Conversation(messages=messages, source="a.jsonl", line=line)


def texts(count: int) -> list[Text]:
    generator = random.Random(5)
    words = [
        " ".join(generator.choices(("red", "green", "blue", "x1"), k=generator.randint(1, 40))) for _ in range(count)
    ]
    return [Text(text=text, source="t.txt", line=i) for i, text in enumerate(words, start=1)]


def test_what_is_cut_and_left_out_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    long_answer = [CHAT[0], {"role": "assistant", "content": "word " * 50}]
    text = Text(text="plain text", source="a.txt", line=1)
    examples = [conversation(CHAT), conversation(LONG), conversation(long_answer), text]
    counts = write_tokens(tmp_path / "rows.arrow", tokenizer, examples, max_length=40)
    rows = read_rows([tmp_path / "rows.arrow"])
    assert (counts.rows, counts.truncated, counts.all_masked, counts.written) == (3, 1, 1, 3)
    assert rows.column_names == ["input_ids", "labels"]
    assert counts.tokens == sum(map(len, rows["input_ids"]))
    assert counts.label_tokens == sum(label != IGNORE for labels in rows["labels"] for label in labels)
    expected = tokenize_conversation(tokenizer, CHAT, max_length=40)
    assert rows[0] == {"input_ids": expected.input_ids, "labels": expected.labels}


def test_a_label_on_the_first_token_alone_teaches_nothing(tmp_path: Path, tokenizer: Any) -> None:
    counts = write_tokens(tmp_path / "rows.arrow", tokenizer, texts(3), max_length=1)
    assert counts == Counts(all_masked=3)
    assert len(read_rows([tmp_path / "rows.arrow"])) == 0


@pytest.mark.parametrize("limit", ["WINDOW", "WINDOW_TOKENS"])
def test_windows_lose_no_document(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Catches a last window that is not written, and documents fitted across windows that are cut or doubled."""

    def documents(name: str) -> list[list[int]]:
        options = {"max_length": 64, "packing": True}
        counts = write_tokens(tmp_path / name, tokenizer, texts(100), **options)
        rows = read_rows([tmp_path / name])
        assert (counts.written, counts.rows) == (len(rows), 100)
        found = []
        for row in rows:
            ends = [sum(row["seq_lengths"][:i]) for i in range(len(row["seq_lengths"]) + 1)]
            assert ends[-1] == len(row["input_ids"]) <= 64
            found += [row["input_ids"][start:end] for start, end in pairwise(ends)]
        return sorted(found)

    whole = documents("whole.arrow")
    monkeypatch.setattr(f"whet.data.tokens.{limit}", 7 if limit == "WINDOW" else 300)
    assert documents("windows.arrow") == whole


def test_every_row_that_fails_is_named(tmp_path: Path) -> None:
    tool = [CHAT[0], {"role": "tool", "content": "3"}, CHAT[1]]
    pair = Preference(prompt=CHAT[:1], chosen=CHAT[1:2], rejected=CHAT[3:], source="p.jsonl", line=5)
    with pytest.raises(WhetErrors) as caught:
        write_tokens(
            tmp_path / "rows", named("mistral"), [conversation(tool, 3), conversation(CHAT), pair], max_length=100
        )
    assert [error.where for error in caught.value.errors] == ["a.jsonl:3", "p.jsonl:5"]


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    bare = load_tokenizer("builtin:tiny")
    bare.chat_template = None
    with pytest.raises(WhetError, match="no chat template"):
        write_tokens(tmp_path / "rows", bare, [conversation(CHAT)], max_length=100)
