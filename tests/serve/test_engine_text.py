"""Tokens to text as they come: whole characters, stop strings over the borders of tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.serve.engines import ask, pieces, save, with_engine
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.in_process.vocabulary import Vocabulary
from whet.serve.engines.mailbox import merged
from whet.serve.engines.text import Detokenizer, StopStrings
from whet.serve.interface import Piece


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer of SentencePiece's shape: a space before words, unknown characters as bytes."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581a",
        "b",
        "\u2581the",
        ".",
    ]
    bpe = models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")


FALLBACK = byte_fallback()


@pytest.fixture(scope="module")
def byte_level(tiny_llama: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_llama)
    return tokenizer


def told(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary.decode)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 499), max_size=60))
def test_pieces_of_a_byte_level_text_add_up(byte_level: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Catches a character lost or told twice where bytes of one are spread over tokens, for any tokens at all."""
    vocabulary = Vocabulary(byte_level, [2], 500)
    pieces = told(vocabulary, ids)
    assert "".join(pieces) == vocabulary.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("aé€😀 .b\n𝄞the"), max_size=40))
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_no_piece_ends_within_a_character(byte_level: PreTrainedTokenizerBase, kind: str, text: str) -> None:
    """Catches half a character told as a replacement sign, and a space lost at a piece's start."""
    vocabulary = Vocabulary(byte_level if kind == "byte_level" else FALLBACK, [2], 500)
    ids = vocabulary.encode(text, special=False)
    pieces = told(vocabulary, ids)
    assert "".join(pieces) == vocabulary.decode(ids)
    assert "\ufffd" not in "".join(pieces)


def test_text_comes_as_soon_as_it_can(byte_level: PreTrainedTokenizerBase) -> None:
    """Catches a stream that says everything at its end."""
    vocabulary = Vocabulary(byte_level, [2], 500)
    pieces = told(vocabulary, vocabulary.encode("plain ascii text, told token by token", special=False))
    assert all(pieces[:-1])
    assert pieces[-1] == ""


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_over_any_borders(chunks: list[str], stops: list[str]) -> None:
    """Catches a stop missed because it began in an earlier piece, and text held back for ever or told too early."""
    scanner = StopStrings(stops)
    passed = ""
    for chunk in chunks:
        passed += scanner.push(chunk)
        if scanner.found:
            break
    whole = "".join(chunks)
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    if not ends:
        assert not scanner.found
        assert passed + scanner.flush() == whole
    else:
        assert scanner.found
        assert whole.startswith(passed)
        assert not any(stop in passed for stop in stops)
        assert len(passed) <= min(end for end, _ in ends)


def test_a_token_s_bytes() -> None:
    """Catches a byte token told by its name, and SentencePiece's mark in place of a space."""
    vocabulary = Vocabulary(FALLBACK, [1], 300)
    names = ["<0xE2>", "\u2581the", ".", "</s>"]
    ids = FALLBACK.convert_tokens_to_ids(names)
    assert [vocabulary.bytes_of(token) for token in ids] == [b"\xe2", b" the", b".", b"</s>"]
    assert vocabulary.bytes_of(9999) == b""


def test_an_answer_stops_before_a_stop_string(tiny_llama: Path, tmp_path: Path) -> None:
    """Catches a stop string in the answer, a log-probability for a token after it, and a slot kept beyond it."""
    folder = save(tmp_path, tiny_llama)

    async def use(engine: InProcessEngine) -> tuple[Piece, Piece, float]:
        long = ask([5, 6], temperature=1.0, seed=4, max_tokens=30, logprobs=0)
        whole = merged(await pieces(engine, long))
        stop = whole.text[9:13]
        cut = merged(
            await pieces(engine, ask([5, 6], temperature=1.0, seed=4, max_tokens=30, logprobs=0, stop=(stop,)))
        )
        await asyncio.sleep(0)
        return whole, cut, engine.load()["running"]

    whole, cut, still_running = with_engine(folder, use)
    assert whole.text.startswith(cut.text)
    assert len(cut.text) <= 9
    assert cut.finish == "stop"
    assert cut.completion_tokens < 30
    told = b"".join(entry.bytes for entry in cut.logprobs).decode(errors="replace")
    assert told.startswith(cut.text)
    assert still_running == 0
