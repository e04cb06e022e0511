"""The first step, on one part of the input at a time: read, clean, redact. What comes out is kept by what went in.

    CHUNK.arrow   the rows, in the order of their ids (COLUMNS); content is an example's canonical JSON
    CHUNK.json    counts, and each bad row's place and reason
    CHUNK.vault   originals of what was redacted, encrypted, where they are kept

A chunk's name is a digest of its bytes, its place and all that is done to it: a run that was killed finds what it had
made, and unchanged parts of the input are not read again. Nothing is written before it is redacted.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from whet.data.clean import Clean, clean
from whet.data.examples import Example, example_of, fields, texts, with_texts
from whet.data.faults import Faults
from whet.data.formats import format_of, normalise
from whet.data.prep.steps import Redaction, Steps, digest_of, fingerprint
from whet.data.read.chunks import Chunk, read_chunk
from whet.data.read.chunks import chunks as chunks_of
from whet.data.split import hash_of, is_late
from whet.errors import WhetError, WhetErrors
from whet.files import refused_when_full, whole_file, write_text

VERSION = 2
"""Of what this step does. Raised when equal input would come out otherwise than before."""
BATCH = 1024
ID_BYTES = 16
COLUMNS = pa.schema(
    [
        ("id", pa.binary(ID_BYTES)),
        ("content", pa.large_string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("characters", pa.int64()),
        ("group", pa.uint64()),  # hash of what the split goes by
        ("stratum", pa.uint64()),
        ("held", pa.bool_()),  # out for evaluation: by its source, or by its time
    ]
)


@dataclass(frozen=True)
class Task:
    """One chunk and what is to be done with it. held: it comes from an evaluation source."""

    chunk: Chunk
    format: str
    columns: dict[str, str]
    held: bool
    steps: Steps
    folder: str

    @functools.cached_property
    def name(self) -> str:
        steps, redact = self.steps, self.steps.redact
        return digest_of(
            [
                VERSION,
                self.chunk.key,
                self.format,
                self.columns,
                self.held,
                vars(steps.clean) if steps.clean else None,
                {**vars(redact), "key": fingerprint(redact.key)} if redact else None,
                vars(steps.split),
                steps.seed,
            ]
        )[:32]

    def path(self, kind: str) -> Path:
        return Path(self.folder) / f"{self.name}.{kind}"


def plan(steps: Steps, base: Path, folder: Path) -> list[Task]:
    """A task for each chunk of every source, in an order that the recipe's does not change.

    Raises WhetError where a source matches nothing, or its first row has no format that is known.
    """
    tasks, faults = [], Faults()
    for sources, held in ((steps.sources, False), (steps.eval_sources, True)):
        for source in sources:
            try:
                format = format_of(source, base) or "text"  # of no row at all, or of bad ones only
                columns = dict(source.columns or {})
                for chunk in chunks_of(source.origin, base):
                    tasks.append(Task(chunk, format, columns, held, steps, str(folder)))
            except WhetErrors:
                raise
            except WhetError as error:
                faults.add(error)
    faults.raise_if_any()
    return sorted(tasks, key=lambda task: (task.held, task.name))


def make(task: Task) -> dict[str, Any]:
    """Make the chunk unless it is there; its counts."""
    if not task.path("json").exists():
        with refused_when_full(task.path("arrow")):
            _Maker(task).make()
    summary: dict[str, Any] = json.loads(task.path("json").read_text(encoding="utf-8"))
    return summary


class _Maker:
    def __init__(self, task: Task):
        self.task, self.steps = task, task.steps
        self.counts: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.sources: dict[str, Counter[str]] = {}
        self.faults: list[dict[str, str | None]] = []
        self.originals: dict[str, str] = {}

    def make(self) -> None:
        rows = sorted(self.rows(), key=lambda row: (row["id"], row["source"], row["line"]))
        write_table(pa.Table.from_pylist(rows, schema=COLUMNS), self.task.path("arrow"))
        if self.originals:
            self.seal()
        summary = {
            "rows": self.counts["rows"],
            "cleaned": self.counts["cleaned"],
            "redacted": self.counts["redacted"],
            "dropped": self.counts["dropped"],
            "found": dict(sorted(self.found.items())),
            "sources": {name: dict(counts) for name, counts in sorted(self.sources.items())},
            "faults": self.faults,
        }
        write_text(self.task.path("json"), json.dumps(summary))

    def rows(self) -> Iterator[dict[str, Any]]:
        for row in read_chunk(self.task.chunk, on_error=self.bad):
            try:
                example = normalise(row, self.task.format, self.task.columns)
                keys = self.keys(example)
            except WhetError as error:
                self.bad(error)
                continue
            self.count(example.source, "rows")
            self.counts["rows"] += 1
            if (changed := self.redacted(self.cleaned(example))) is not None:
                yield {
                    "id": bytes.fromhex(changed.id)[:ID_BYTES],
                    "content": changed.canonical,
                    "source": example.source,
                    "line": example.line,
                    "characters": sum(map(len, texts(changed))),
                    **keys,
                }

    def bad(self, error: WhetError) -> None:
        source, _, line = (error.where or "").rpartition(":")
        self.count(source if line.isdigit() else error.where or "", "bad")
        self.faults.append({"where": error.where, "reason": error.what, "fix": error.fix})

    def count(self, source: str, what: str) -> None:
        self.sources.setdefault(source, Counter())[what] += 1

    def keys(self, example: Example) -> dict[str, Any]:
        """What the split goes by, as hashes: columns may hold names that are not to be kept."""
        split, seed = self.steps.split, self.steps.seed
        held = self.task.held
        if split.time and not held:
            held = is_late(_column(example, split.time), str(split.at), where=example.where)
        group = _column(example, split.group_by) if split.group_by and not self.task.held else None
        stratum = _column(example, split.stratify_by) if split.stratify_by and not self.task.held else None
        return {
            "group": None if group is None else hash_of(group, seed),
            "stratum": None if stratum is None else hash_of(stratum, seed),
            "held": held,
        }

    def cleaned(self, example: Example) -> Example:
        how: Clean | None = self.steps.clean
        if how is None:
            return example
        said = fields(example)
        inside = replace(how, whitespace=False)  # a separator, a patch: space that a program reads
        after = [clean(text, how if label is None else inside) for text, label in said]
        if all(new == text for new, (text, _) in zip(after, said, strict=True)):
            return example
        self.counts["cleaned"] += 1
        return with_texts(example, after)

    def redacted(self, example: Example) -> Example | None:
        """The example without personal data; None where its policy drops it."""
        if self.steps.redact is None:
            return replace(example, extra={})
        said = fields(example)
        row = redactor(self.steps.redact).row([text for text, _ in said], [label for _, label in said])
        self.found.update(row.counts)
        if row.dropped:
            self.counts["dropped"] += 1
            return None
        self.counts["redacted"] += bool(row.counts)
        self.originals |= row.originals
        return replace(with_texts(example, row.texts), extra={})

    def seal(self) -> None:
        from whet.data.redact.vault import seal

        assert self.steps.redact is not None
        assert self.steps.redact.key is not None
        with whole_file(self.task.path("vault")) as partial:
            partial.write_bytes(seal(self.originals, self.steps.redact.key))


def _column(example: Example, name: str) -> Any:
    value = example.extra.get(name)
    if value is None:
        others = ", ".join(map(str, example.extra)) or "none left"
        fix = f"fill it in, or name another column: {others}"
        raise WhetError(f"no value in the column {name!r}, which the split goes by", where=example.where, fix=fix)
    return value


_redactors: dict[str, Any] = {}


def redactor(how: Redaction) -> Any:
    """This process's redactor: making one compiles patterns and may load a model."""
    from whet.data.redact.policy import Policy
    from whet.data.redact.redactor import Redactor

    name = digest_of([how.policy, dict(how.classes), fingerprint(how.key), how.ner, how.vault, how.regions])
    if name not in _redactors:
        policy = Policy(name=how.policy, classes=dict(how.classes), regions=how.regions)
        _redactors[name] = Redactor(policy, key=how.key, ner=how.ner, keep_originals=how.vault)
    return _redactors[name]


# ------------------------------------------------------------------ files of rows


def write_table(table: pa.Table, path: Path) -> None:
    """As an Arrow file of compressed batches, there whole or not at all."""
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        whole_file(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_file(file, table.schema, options=options) as writer,
    ):
        writer.write_table(table, max_chunksize=BATCH)


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    wanted = [COLUMNS.get_field_index(name) for name in names]
    options = pa.ipc.IpcReadOptions(included_fields=sorted(wanted))
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file, options=options).read_all()


def read_rows_of(path: Path, start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop`; only the batches that hold them are read."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = [
            reader.get_batch(i) for i in range(start // BATCH, min(-(-stop // BATCH), reader.num_record_batches))
        ]
    table = pa.Table.from_batches(batches, schema=COLUMNS)
    return table.slice(start % BATCH, stop - start)


def examples_of(path: Path, rows: np.ndarray[Any, Any] | None = None) -> Iterator[Example]:
    """The examples of a chunk, or of those rows of it that `rows` numbers."""
    table = read_columns(path, ["content", "source", "line"])
    if rows is not None:
        table = table.take(pa.array(rows))
    for batch in table.to_batches(max_chunksize=BATCH):
        for row in batch.to_pylist():
            yield example_in(row["content"], row["source"], row["line"])


def example_in(content: str, source: str = "", line: int = 0) -> Example:
    return example_of(json.loads(content), source, line)
