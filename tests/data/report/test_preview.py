"""The page shows each row whole, dims what is masked, marks special tokens, and runs nothing that a row holds."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import CHAT, conversations, labelled_runs, named
from whet.data.report.preview import preview_html, runs
from whet.data.template import IGNORE, Tokenized, preview, render, tokenize_conversation, tokenize_text

HOSTILE = "</span></div><script>alert(1)</script><img src=x onerror=alert(2)> &lt;b&gt; {{ 7*7 }}"


class Page(HTMLParser):
    """The spans of each row, as (class, text), the row's heading, and all tags."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows: list[list[tuple[str, str]]] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.place: str | None = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        kind = dict(attrs).get("class") or ""
        if kind == "row":
            self.headings.append("")
            self.place = "heading"
        elif kind == "tokens":
            self.rows.append([])
            self.place = "tokens"
        elif self.place == "tokens" and tag == "span":
            self.rows[-1].append((kind, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("div", "header"):
            self.place = None

    def handle_data(self, data: str) -> None:
        if self.place == "heading":
            self.headings[-1] += data
        elif self.place == "tokens":
            kind, text = self.rows[-1][-1]
            self.rows[-1][-1] = (kind, text + data)

    def text(self, row: int) -> str:
        return "".join(text for _, text in self.rows[row])


@settings(deadline=None, max_examples=25)
@given(messages=conversations())
def test_the_runs_are_the_terminal_previews_text_and_learned_spans(messages: list[dict[str, str]]):
    """Catches a token that is shown twice, left out, or on the wrong ground."""
    tokenizer = named("chatml")
    row = tokenize_conversation(tokenizer, messages, max_length=10_000)
    found = list(runs(tokenizer, row))
    assert "".join(run.text for run in found) == preview(tokenizer, row).plain == render(tokenizer, messages)
    learned = "".join(run.text for run in found if run.learned)
    assert learned == "".join(labelled_runs(tokenizer, row.input_ids, row.labels))
    assert {run.text for run in found if run.special} <= {"<|im_start|>", "<|im_end|>", *tokenizer.all_special_tokens}


def test_the_page_shows_every_row_with_its_counts(tmp_path: Path):
    tokenizer = named("chatml")
    whole = tokenize_conversation(tokenizer, CHAT, max_length=1000)
    cut = tokenize_conversation(tokenizer, CHAT, max_length=4)
    preview_html(tokenizer, [whole, cut, tokenize_text(tokenizer, "Any text.", max_length=50)], tmp_path / "rows.html")
    page = Page(tmp_path / "rows.html")
    assert page.text(0) == render(tokenizer, CHAT)
    assert [text for kind, text in page.rows[0] if kind == "learned mark"] == ["<|im_end|>"] * 2
    assert [text for kind, text in page.rows[0] if kind == "learned"] == ["Yo", "Ciao"]
    assert ("masked mark", "<|im_start|>") in page.rows[0]
    labels = sum(label != IGNORE for label in whole.labels)
    assert f"{len(whole.input_ids)} tokens" in page.headings[0]
    assert f"{labels} of them labels" in page.headings[0]
    assert "cut" not in page.headings[0]
    assert "cut at the end" in page.headings[1]
    assert "nothing to learn from" in page.headings[1]
    assert all(kind.startswith("learned") for kind, _ in page.rows[2])


def test_a_row_cannot_write_html(tmp_path: Path):
    """Catches a record's text that is put into the page as it is."""
    tokenizer = named("chatml")
    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    preview_html(tokenizer, [tokenize_conversation(tokenizer, messages, max_length=1000)], tmp_path / "rows.html")
    page = Page(tmp_path / "rows.html")
    assert page.text(0) == render(tokenizer, messages)
    assert not {"script", "img"} & set(page.tags)
    assert "default-src 'none'" in (tmp_path / "rows.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_a_special_token_that_a_record_spells_is_marked(name: str):
    """Catches the case where a record ends the model's turn: the mark is how a reader sees it."""
    tokenizer = named(name)
    stop = tokenizer.eos_token
    ids = tokenizer(f"before {stop}{stop} after", add_special_tokens=False)["input_ids"]
    found = list(runs(tokenizer, Tokenized(ids, ids, truncated=False)))
    assert [run.text for run in found if run.special] == [stop, stop]


def test_a_space_that_a_token_carries_is_shown():
    """Catches runs decoded alone, which lose the space that begins a token of a SentencePiece vocabulary."""
    backend = Tokenizer(models.WordLevel({"\u2581Hi": 0, "\u2581Yo": 1, "<s>": 2}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    found = list(runs(tokenizer, Tokenized([0, 1], [IGNORE, 1], truncated=False)))
    assert [run.text for run in found] == ["Hi", " Yo"]


def test_a_character_cut_at_the_end_is_seen():
    tokenizer = named("chatml")
    ids = tokenizer("a \u00df", add_special_tokens=False)["input_ids"]
    (run,) = runs(tokenizer, Tokenized(ids[:-1], ids[:-1], truncated=True))
    assert run.text == tokenizer.decode(ids[:-1]) == "a \ufffd"


def test_no_rows_make_an_empty_page(tmp_path: Path):
    preview_html(named("chatml"), [], tmp_path / "rows.html")
    assert Page(tmp_path / "rows.html").rows == []
