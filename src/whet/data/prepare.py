"""A version of a data set, made ready for a model: token ids to train on, held-out ones, and questions to ask.

    FOLDER/
      train-00000.arrow, ...      token ids and labels (tokens.py), packed or not; for dpo preference pairs
      heldout-00000.arrow, ...    token ids and labels
      questions-00000.jsonl, ...  {"prompt": ..., "reference": ...} a line

The version's parts are tokenized, packed and written one by one, on all cores; the files are the same on any machine.
Preference pairs alone are held in memory: their trainer tokenizes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from whet.data import template
from whet.data.examples import Conversation, Example, Preference
from whet.data.faults import Faults
from whet.data.prep.engine import Engine, Local
from whet.data.prep.prep import Progress
from whet.data.prep.versions import Version, read_part
from whet.data.tokens import Counts, read_rows, write_tokens
from whet.errors import WhetError

SMALL = 8 << 20
"""Bytes of rows that are tokenized sooner than other processes have started."""


@dataclass(frozen=True)
class Question:
    """prompt: text as the model sees it, generation prompt included. reference: the answer that the row holds."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class Tokenizing:
    """How parts become token ids: a function of a part's path, to run in any process."""

    tokenizer: PreTrainedTokenizerBase
    folder: Path
    max_length: int
    train_on: template.TrainOn
    packing: bool

    def __call__(self, part: Path) -> Counts:
        side, _, number = part.stem.partition("-")
        if side == "train":
            return self.write(f"train-{number}", read_part(part), self.packing)
        with open(self.folder / f"questions-{number}.jsonl", "w", encoding="utf-8") as file:
            return self.write(f"heldout-{number}", self.asked(read_part(part), file), packing=False)

    def write(self, name: str, examples: Iterable[Example], packing: bool) -> Counts:
        return write_tokens(
            self.folder / f"{name}.arrow",
            self.tokenizer,
            examples,
            max_length=self.max_length,
            train_on=self.train_on,
            packing=packing,
        )

    def asked(self, examples: Iterable[Example], file: TextIO) -> Iterator[Example]:
        """The held-out examples as conversations and texts; each conversation's question goes to the file."""
        for example in map(_chosen, examples):
            yield example  # tokenizing says what is wrong with it
            if isinstance(example, Conversation):
                file.write(json.dumps(asdict(self.question(example))) + "\n")

    def question(self, example: Conversation) -> Question:
        answer = next((m["content"] for m in reversed(example.messages) if m["role"] == "assistant"), "")
        try:
            return Question(template.prompt_text(self.tokenizer, example.messages, tools=example.tools), answer)
        except WhetError as error:
            raise WhetError(error.what, where=example.where, fix=error.fix) from error


def prepare(
    version: Version,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    method: str,
    max_length: int,
    train_on: template.TrainOn,
    packing: bool,
    engine: Engine,
    progress: Progress,
) -> dict[str, Any]:
    """Write the version's rows for `method`, sft or dpo, into `folder`; counts to show.

    Raises WhetError when the rows do not fit the method or nothing is left to learn from.
    """
    sides = ("eval",) if method == "dpo" else ("train", "eval")
    pairs = _write_pairs(version, folder / "train-00000.arrow") if method == "dpo" else 0
    parts = [(side, part) for side in sides for part in version.parts(side)]
    counts = {side: Counts() for side in sides}
    tokenizing = Tokenizing(tokenizer, folder, max_length, train_on, packing)
    small = sum(part.stat().st_size for _, part in parts) < SMALL
    with closing(Local(1) if small else engine) as work:
        made = work.map(tokenizing, [part for _, part in parts])
        for done, ((side, _), count) in enumerate(zip(parts, made, strict=True), start=1):
            counts[side] += count
            progress("tokenize", done, len(parts))
    for side in sides:
        if not counts[side].rows:
            raise _nothing_to_learn(side, counts[side].all_masked, max_length)
    train = {"pairs": pairs} if method == "dpo" else _shown(counts["train"], max_length, packing)
    return train | {"held out": counts["eval"].rows}


def rows(folder: Path, side: str) -> Dataset:
    """side: train or heldout. Mapped from their files, not read into memory."""
    return read_rows(sorted(folder.glob(f"{side}-*.arrow")))


def questions(folder: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions, or all."""
    lines = (line for path in sorted(folder.glob("questions-*.jsonl")) for line in path.open(encoding="utf-8"))
    return [Question(**json.loads(line)) for line in islice(lines, limit)]


def _shown(counts: Counts, max_length: int, packing: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"rows": counts.rows, "tokens": counts.tokens, "label tokens": counts.label_tokens}
    left = {"truncated": counts.truncated, "all masked": counts.all_masked}
    shown |= {name: value for name, value in left.items() if value}
    if packing:
        full = counts.tokens / (counts.written * max_length)
        shown |= {"packed rows": counts.written, "full": f"{full:.1%}"}
    return shown


def _write_pairs(version: Version, path: Path) -> int:
    """Write the preference pairs; how many."""
    faults, pairs = Faults(), []
    for example in version.examples("train"):
        if isinstance(example, Preference):
            pairs.append(example.content())
        else:
            what, fix = "dpo learns from preference pairs", "use rows with prompt, chosen and rejected, or method: sft"
            faults.add(WhetError(f"{what}, and this row is none", where=example.where, fix=fix))
    faults.raise_if_any()
    table = Dataset.from_list(pairs).with_format("arrow")[:]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table)
    return len(pairs)


def _chosen(example: Example) -> Example:
    """A preference pair as the conversation it prefers; others unchanged."""
    if not isinstance(example, Preference):
        return example
    messages = [*example.prompt, *example.chosen]
    return Conversation(messages=messages, source=example.source, line=example.line)


def _nothing_to_learn(side: str, all_masked: int, max_length: int) -> WhetError:
    name = "training" if side == "train" else "held-out"
    if not all_masked:
        return WhetError(f"there are no {name} rows", where="data", fix="check the sources and the split")
    return WhetError(
        f"not one of {all_masked} {name} rows has a label left after it is cut to {max_length} tokens",
        where="data",
        fix="raise max_seq_length, or shorten the prompts",
    )
