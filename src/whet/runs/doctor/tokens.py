"""What the rows trained on tell: duplicates, leaks of held-out rows, masked, cut and unreadable ones, the template.

Read are data/train-*.arrow and data/heldout-*.arrow (token ids and labels, packed or not), data/summary.json,
data/manifest.json and data/fingerprint.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from whet.runs.doctor.findings import Finding, Severity
from whet.runs.report.record import Record

MOST = 200_000
"""Documents of a side that are looked at; a larger set is judged by its first ones."""

REPEATED, MOSTLY_REPEATED = 0.05, 0.3
LEAKED = 0.01
MASKED, MOSTLY_MASKED = 0.1, 0.5
CUT, MOSTLY_CUT = 0.2, 0.5
BAD, MANY_BAD = 0.01, 0.1
"""Shares of the rows: from the first on a warning, from the second on an error."""

MARKER = re.compile(r"<\|[a-z_]{2,30}\|>|<(?:start|end)_of_turn>")
"""Marks of turns in chat templates, each of them one token of the vocabulary it is made for."""

SAMPLE = 50
"""Documents in which marks are looked for."""


def find_in_data(record: Record) -> list[Finding]:
    """Nothing for what is not there: a run may have stopped before its data was made."""
    folder = record.folder / "data"
    return [
        *_unreadable_rows(record),
        *_masked(record),
        *_cut(record),
        *_template(record),
        *_repeats(folder),
    ]


def documents(folder: Path, side: str) -> Iterator[bytes]:
    """The token ids (int32) of each document of a side, train or heldout; none where rows are not token ids."""
    for path in sorted(folder.glob(f"{side}-*.arrow")):
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                if "input_ids" in batch.schema.names:
                    yield from _split(batch)


def _split(batch: Any) -> Iterator[bytes]:
    packed = "seq_lengths" in batch.schema.names
    lengths = batch.column("seq_lengths") if packed else None
    for i, row in enumerate(batch.column("input_ids")):
        ids, begin = row.values.to_numpy(zero_copy_only=False), 0
        for length in lengths[i].as_py() if lengths is not None else [len(ids)]:
            yield ids[begin : begin + length].tobytes()
            begin += length


# ---------------------------------------------------------------- repeats and leaks


def _repeats(folder: Path) -> Iterator[Finding]:
    try:
        seen = Counter(_digests(folder, "train"))
        held = list(_digests(folder, "heldout"))
    except (pa.ArrowInvalid, OSError):
        yield Finding(
            "error",
            "unreadable rows",
            "data/*.arrow",
            "the token ids can't be read",
            "remove the run's data folder and run the recipe again",
        )
        return
    total = seen.total()
    more = total - len(seen)
    if total and more >= REPEATED * total:
        yield Finding(
            _severity(more, total, MOSTLY_REPEATED),
            "duplicated data",
            "data/train-*.arrow",
            f"{more:,} of {total:,} rows are copies of others, one of them {seen.most_common(1)[0][1]:,} times: they "
            "are learned by heart, and weigh as much as they are many",
            "let data.dedup take them out, or set train.epochs where repetition is meant",
        )
    leaked = sum(digest in seen for digest in held)
    if leaked:
        yield Finding(
            _severity(leaked, len(held), LEAKED),
            "leaking evaluation",
            "data/heldout-*.arrow",
            f"{leaked:,} of {len(held):,} held-out rows are trained on: their score says nothing about new ones",
            "set data.leaks.gate to refuse or drop, and run the recipe again",
        )


def _digests(folder: Path, side: str) -> Iterator[bytes]:
    return (hashlib.blake2b(row, digest_size=16).digest() for row in islice(documents(folder, side), MOST))


# ---------------------------------------------------------------- rows that teach little


def _unreadable_rows(record: Record) -> Iterator[Finding]:
    read = record.data.get("stages", {}).get("read") or {}
    bad = _count(read.get("bad"))
    rows = _count(read.get("rows")) + bad
    if bad:
        reasons = sorted((read.get("reasons") or {}).items(), key=lambda item: -item[1])
        said = "; ".join(f"{reason} ({count:,})" for reason, count in reasons[:3])
        yield Finding(
            _severity(bad, rows, MANY_BAD) if bad >= BAD * rows else "note",
            "unreadable rows",
            "quarantine.jsonl of the data's version",
            f"{bad:,} of {rows:,} rows were unreadable and left out{': ' + said if said else ''}",
            "mend the file: its rows were meant to be learned; with data.bad_rows: 0 a run refuses it",
        )


def _masked(record: Record) -> Iterator[Finding]:
    summary = record.stages.get("data") or {}
    masked, rows = _count(summary.get("all masked")), _count(summary.get("rows"))
    if masked >= MASKED * (masked + rows) > 0:
        yield Finding(
            _severity(masked, masked + rows, MOSTLY_MASKED),
            "nothing to learn from",
            "data/train-*.arrow",
            f"{masked:,} of {masked + rows:,} rows have no label left and were left out: the prompt fills "
            "max_seq_length, or no answer was found",
            "raise model.max_seq_length, shorten the prompts, or see data.train_on",
        )


def _cut(record: Record) -> Iterator[Finding]:
    summary = record.stages.get("data") or {}
    cut, rows = _count(summary.get("truncated")), _count(summary.get("rows"))
    if cut >= CUT * rows > 0:
        yield Finding(
            _severity(cut, rows, MOSTLY_CUT),
            "cut rows",
            "data/train-*.arrow",
            f"{cut:,} of {rows:,} rows are cut at max_seq_length: the model learns answers without their ends",
            "raise model.max_seq_length, or split the long rows",
        )


# ---------------------------------------------------------------- the template


def _template(record: Record) -> Iterator[Finding]:
    """A template that is not the base's own, or whose marks the vocabulary lacks."""
    folder = record.folder
    made, trained = (_json(folder / name / "fingerprint.json") for name in ("data", "trained"))
    model = record.recipe.get("model") or {}
    own = base_template(str(model.get("base", "")))
    if made and trained and made.get("template") != trained.get("template"):
        yield _wrong("trained/", "the data was made with another chat template than the model was trained with")
    elif own is not None and made and made.get("template") != _digest(own):
        named = f"model.template: {model['template']}" if model.get("template") else "the tokenizer"
        yield _wrong(named, "the rows are in another chat template than the one that the base was tuned with")
    elif marks := _spelled(folder):
        yield _wrong(
            "data/train-*.arrow", f"the vocabulary has no token for {', '.join(marks)}: each is spelled in pieces"
        )


def _wrong(where: str, what: str) -> Finding:
    fix = "leave model.template out, so that the base's own is used, or name the one it was tuned with"
    return Finding("warning", "wrong template", where, what, fix)


def base_template(base: str) -> str | None:
    """The chat template of a base that is built in or a local folder; None where it has none or lies elsewhere."""
    builtin = base.startswith("builtin:")
    folder = files("whet") / "builtin" / base.partition(":")[2] if builtin else Path(base)
    try:
        if (path := folder / "chat_template.jinja").is_file():
            return path.read_text(encoding="utf-8")
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def _digest(template: str) -> str:
    """As data/fingerprint.json has it."""
    return hashlib.sha256(json.dumps(template).encode("ascii")).hexdigest()[:16]


def _spelled(folder: Path) -> list[str]:
    """Marks of turns that most documents hold, and that are no token of the run's tokenizer."""
    from tokenizers import Tokenizer

    found = sorted(folder.glob("trained/tokenizer.json")) or sorted(folder.glob("checkpoints/*/tokenizer.json"))
    try:
        sample = list(islice(documents(folder / "data", "train"), SAMPLE))
    except (pa.ArrowInvalid, OSError):
        return []
    if not found or not sample:
        return []
    try:
        tokenizer = Tokenizer.from_file(str(found[-1]))
    except Exception:  # tokenizers raises nothing narrower
        return []
    counts: Counter[str] = Counter()
    for row in sample:
        ids = memoryview(row).cast("i").tolist()
        counts.update(set(MARKER.findall(tokenizer.decode(ids, skip_special_tokens=False))))
    often = [mark for mark, count in counts.items() if count > 0.9 * len(sample)]
    return sorted(mark for mark in often if tokenizer.token_to_id(mark) is None)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _severity(part: int, whole: int, error: float) -> Severity:
    return "error" if part >= error * whole else "warning"
