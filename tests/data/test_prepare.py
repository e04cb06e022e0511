"""A version made ready: rows with labels, questions with their references."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.road import COLOURS, CONVERSATIONS
from whet.data.prep.engine import Local
from whet.data.prep.versions import Version, write_line
from whet.data.prepare import prepare, questions, rows
from whet.errors import WhetError
from whet.models.load import load_tokenizer

PAIRS = [
    {side: [{"role": role, "content": text}] for side, role, text in told}
    for told in (
        [("prompt", "user", f"Number {i}?"), ("chosen", "assistant", f"yes {i}"), ("rejected", "assistant", "no")]
        for i in range(20)
    )
]
OPTIONS: dict[str, Any] = {"method": "sft", "max_length": 64, "train_on": "responses", "packing": True}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny")


def version(folder: Path, contents: list[dict[str, Any]], parts: int = 1) -> Version:
    """Every fourth row is held out; each side in so many files."""
    folder.mkdir()
    for side, chosen in (("train", lambda i: i % 4), ("eval", lambda i: i % 4 == 0)):
        numbers = [i for i in range(len(contents)) if chosen(i)]
        for part in range(parts):
            lines = [write_line(contents[i], f"{i:064}", "rows.jsonl", i + 1) for i in numbers[part::parts]]
            (folder / f"{side}-{part:05}.jsonl").write_bytes(b"".join(lines))
    return Version(folder)


def made(
    folder: Path, tokenizer: Any, contents: list[dict[str, Any]], name: str = "data", workers: int = 1, **options: Any
) -> dict[str, Any]:
    out = folder / name
    out.mkdir()
    source = version(folder / f"{name}-version", contents, parts=options.pop("parts", 1))
    seen: list[tuple[str, int, int]] = []
    told = {"engine": Local(workers), "progress": lambda *step: seen.append(step)}
    summary = prepare(source, tokenizer, out, **(OPTIONS | told | options))
    assert seen[-1][0] == "tokenize"
    assert seen[-1][1] == seen[-1][2]
    return summary


def test_only_answers_carry_labels(tmp_path: Path, tokenizer: Any) -> None:
    made(tmp_path, tokenizer, CONVERSATIONS, packing=False)
    for row in [*rows(tmp_path / "data", "heldout"), *rows(tmp_path / "data", "train")]:
        learned = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert learned.removesuffix(tokenizer.eos_token).strip() in COLOURS
        assert "Which colour" in tokenizer.decode(row["input_ids"])


def test_questions_end_where_the_answer_begins(tmp_path: Path, tokenizer: Any) -> None:
    """Catches a reference inside its own question, and a prompt that training never saw."""
    made(tmp_path, tokenizer, CONVERSATIONS)
    asked, held = questions(tmp_path / "data"), rows(tmp_path / "data", "heldout")
    assert len(asked) == len(held) == 6
    for question, row in zip(asked, held, strict=True):
        text = tokenizer.decode(row["input_ids"])
        assert text.startswith(question.prompt)
        assert text[len(question.prompt) :].startswith(question.reference)
    assert questions(tmp_path / "data", 2) == asked[:2]


def test_packing_loses_no_token(tmp_path: Path, tokenizer: Any) -> None:
    summary = made(tmp_path, tokenizer, CONVERSATIONS, "packed")
    made(tmp_path, tokenizer, CONVERSATIONS, "single", packing=False)
    packed, single = rows(tmp_path / "packed", "train"), rows(tmp_path / "single", "train")
    assert len(packed) == summary["packed rows"] < len(single)
    assert sorted(chain.from_iterable(packed["input_ids"])) == sorted(chain.from_iterable(single["input_ids"]))
    assert sum(map(sum, packed["seq_lengths"])) == sum(map(len, single["input_ids"])) == summary["tokens"]
    assert summary["full"] == f"{summary['tokens'] / (64 * len(packed)):.1%}"


def test_several_processes_write_what_one_does(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches parts that are lost, doubled or in another order, and a tokenizer that changes on its way to a worker."""
    monkeypatch.setattr("whet.data.prepare.SMALL", 0)
    summaries = [
        made(tmp_path, tokenizer, CONVERSATIONS, name, workers=workers, parts=3)
        for name, workers in (("one", 1), ("two", 2))
    ]
    assert summaries[0] == summaries[1]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 9
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(questions(tmp_path / "two")) == len(rows(tmp_path / "two", "heldout")) == 6


def test_pairs_are_kept_and_their_better_answers_evaluated(tmp_path: Path, tokenizer: Any) -> None:
    assert made(tmp_path, tokenizer, PAIRS, method="dpo") == {"pairs": 15, "held out": 5}
    train = rows(tmp_path / "data", "train")
    assert set(train.column_names) == {"prompt", "chosen", "rejected"}
    assert train[0]["chosen"][0]["content"].startswith("yes")
    assert all(question.reference.startswith("yes") for question in questions(tmp_path / "data"))


def test_what_is_left_out_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    answer = {"role": "assistant", "content": "red"}
    long = [{"messages": [{"role": "user", "content": f"{i} " * 100}, answer]} for i in range(12)]
    summary = made(tmp_path, tokenizer, [*CONVERSATIONS, *long])
    assert (summary["rows"], summary["all masked"]) == (18, 9)


def test_rows_that_all_lose_their_labels_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(WhetError, match="not one of 18 training rows has a label left after it is cut to 8 tokens"):
        made(tmp_path, tokenizer, CONVERSATIONS, max_length=8)


def test_sft_refuses_pairs_by_file_and_line(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a fault that loses its place on the way from a worker."""
    monkeypatch.setattr("whet.data.prepare.SMALL", 0)
    with pytest.raises(WhetError, match=r"rows\.jsonl:\d+: a preference pair is no example") as caught:
        made(tmp_path, tokenizer, PAIRS, workers=2, parts=2)
    assert "train with method: dpo" in str(caught.value)


def test_dpo_refuses_conversations_by_file_and_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(WhetError, match=r"rows\.jsonl:\d+: dpo learns from preference pairs"):
        made(tmp_path, tokenizer, CONVERSATIONS, method="dpo")
