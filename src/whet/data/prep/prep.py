"""Raw records -> a version of a data set: cleaned, redacted, without duplicates, split, and free of leaks.

    read       every chunk of every source: read, clean, redact            chunks.py, on all cores
    sign       signatures of what the rows say                             signing.py, on all cores
    dedup      rows that say the same are one row                          on arrays of numbers, here
    split      who is held out, by a keyed hash                            the same
    leaks      training rows that hold evaluation text                     gate.py, on all cores
    write      the version's files                                         write.py, on all cores

What is large stays in files; only numbers of every row are held at once: some 200 bytes a row. No step depends on the
order in which rows, files or workers come.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from whet.data.clean import clean
from whet.data.faults import LIMIT
from whet.data.prep import chunks, write
from whet.data.prep.engine import Engine, Local, cores
from whet.data.prep.gate import Gate
from whet.data.prep.rows import Duplicates, Rows
from whet.data.prep.signing import Signed, sign_chunks
from whet.data.prep.steps import Steps, digest_of
from whet.data.prep.versions import SHOWN, SIDES, Store, Version, digest_of_rows
from whet.data.similar.duplicates import Flags, keepers
from whet.data.similar.tasks import TaskText, read_tasks
from whet.data.split import resolve_straddling, sides, stratified_sides
from whet.errors import WhetError, WhetErrors
from whet.files import refused_when_full, staged_folder

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with a step's name, the parts that are done, and all of its parts."""
Witness = Callable[[str], AbstractContextManager[list[Version]]]
"""Called with a digest of all that goes into a version, when one is to be made; it is put into the list once it is."""
SMALL = 1 << 20
"""Bytes of sources that are through sooner than other processes have started."""


def prep(
    name: str,
    steps: Steps,
    base: Path,
    root: Path,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
    witness: Witness | None = None,
) -> Version:
    """The version of `name` under `root` that the steps make of their sources, whose paths start at `base`.

    What an earlier call made is not made again, finished or not. witness: is there while a version is made.
    Raises WhetError: a source at fault, more bad rows than allowed, a side left empty, a leak.
    """
    base, store = base.absolute(), Store(root.absolute() / name)  # workers may be at home elsewhere
    work = engine or Local(cores())
    with store.locked(), closing(work), refused_when_full(store.folder):
        return _Preparation(name, steps, base, store, work, progress or _silent, witness or _nobody).run()


def _silent(step: str, done: int, parts: int) -> None:
    pass


@contextmanager
def _nobody(made_of: str) -> Iterator[list[Version]]:
    yield []


@dataclass
class _Preparation:
    name: str
    steps: Steps
    base: Path
    store: Store
    engine: Engine
    progress: Progress
    witness: Witness
    done: dict[str, Any] = field(default_factory=dict)  # the manifest's stages
    duplicates: Duplicates | None = None

    def run(self) -> Version:
        tasks = chunks.plan(self.steps, self.base, self.store.cache)
        made_of = self.made_of(tasks)
        if (known := self.store.known(made_of)) is not None:
            return known
        with self.witness(made_of) as seen:
            version = self.make(tasks)
            seen.append(version)
        self.store.record(version, made_of)
        self.store.forget({task.name for task in tasks})
        return version

    def make(self, tasks: Sequence[chunks.Task]) -> Version:
        if isinstance(self.engine, Local) and _are_small(tasks):
            self.engine = Local(1)
        made = self.each("read", chunks.make, tasks)
        self.check_bad_rows(made)
        self.count_reading(tasks, made)
        rows = Rows.load(tasks, self.steps)
        signed = self.sign(tasks)
        kept = self.without_duplicates(rows, signed)
        held = self.split(rows, signed, kept)
        kept &= ~self.leaking(tasks, rows, signed, kept, held)
        self.check_sides(kept, held)
        return self.write(tasks, made, rows, kept, held)

    def made_of(self, tasks: Sequence[chunks.Task]) -> str:
        """A digest of all that goes into the version."""
        asked = [(task.text, task.role) for task in self.asked]
        return digest_of([self.steps.digest(), [task.name for task in tasks], asked])

    @functools.cached_property
    def asked(self) -> list[TaskText]:
        """The texts of the evaluation tasks."""
        return read_tasks(self.steps.leaks.tasks, self.base) if self.steps.leaks else []

    def each(self, step: str, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """The function's results, in the order of the items, while progress is told."""
        results: list[T] = []
        self.progress(step, 0, len(items))
        for result in self.engine.map(function, items):
            results.append(result)
            self.progress(step, len(results), len(items))
        return results

    # ------------------------------------------------------------ reading

    def check_bad_rows(self, made: Sequence[dict[str, Any]]) -> None:
        faults = write.in_order(fault for summary in made for fault in summary["faults"])
        rows = sum(summary["rows"] for summary in made)
        if len(faults) <= self.steps.bad_rows * (rows + len(faults)) and (rows or not faults):
            return
        write.quarantine(faults, self.store.folder / "quarantine.jsonl")
        shown = [WhetError(fault["reason"], where=fault["where"], fix=fault["fix"]) for fault in faults[:LIMIT]]
        if len(faults) > LIMIT:
            more = f"stopped at {LIMIT} faults of {len(faults)} in {rows + len(faults)} rows"
            shown.append(WhetError(more, fix=f"all of them are in {self.store.folder / 'quarantine.jsonl'}"))
        raise WhetErrors(shown)

    def count_reading(self, tasks: Sequence[chunks.Task], made: Sequence[dict[str, Any]]) -> None:
        reasons = Counter(write.kind_of(fault["reason"]) for summary in made for fault in summary["faults"])
        total = {name: sum(summary[name] for summary in made) for name in ("rows", "cleaned", "redacted", "dropped")}
        formats = ", ".join(sorted({task.format for task in tasks}))
        counts = {"rows": total["rows"], "bad": reasons.total(), "format": formats}
        self.done["read"] = {**counts, "reasons": dict(reasons.most_common())}
        self.done["clean"] = {"changed": total["cleaned"]} if self.steps.clean else None
        self.done["redact"] = None
        if self.steps.redact:
            found: Counter[str] = Counter()
            for summary in made:
                found.update(summary["found"])
            self.done["redact"] = {
                "policy": self.steps.redact.policy,
                "rows_changed": total["redacted"],
                "rows_dropped": total["dropped"],
                "found": dict(sorted(found.items())),
                "modes": dict(self.steps.redact.classes),
                "not_covered": chunks.redactor(self.steps.redact).not_covered,
            }

    # ------------------------------------------------------------ what every row is compared in

    def sign(self, tasks: Sequence[chunks.Task]) -> Signed | None:
        """Signatures, where a step needs them."""
        dedup, leaks = self.steps.dedup, self.steps.leaks
        if leaks is None and (dedup is None or dedup.near is None):
            return None
        threshold = dedup.near if dedup and dedup.near else 0.85
        return sign_chunks(tasks, threshold, lambda function, items: self.each("sign", function, items))

    def without_duplicates(self, rows: Rows, signed: Signed | None) -> Flags:
        """Which rows stay. Training and evaluation sources are each a set of their own; between them it is a leak."""
        dedup = self.steps.dedup
        kept = np.ones(len(rows), np.bool_)
        self.done["dedup"] = None
        if dedup is None:
            return kept
        counts = {"exact": 0, "near": 0, "clusters": 0, "largest": 1, "threshold": dedup.near}
        if dedup.exact:
            kept = keepers(_labels(rows.id, rows.held), rows.characters, rows.id)
            counts["exact"] = int((~kept).sum())
        if dedup.near is not None and signed is not None:
            labels = _labels(signed.labels(), rows.held)
            near = kept & keepers(labels, rows.characters, rows.id)
            counts["near"] = int(kept.sum() - near.sum())
            kept = near
        else:
            labels = _labels(rows.id, rows.held)
        self.duplicates = Duplicates.of(labels, kept)
        sizes = np.unique(labels, return_counts=True)[1]
        counts["clusters"], counts["largest"] = int((sizes > 1).sum()), int(sizes.max(initial=0))
        self.done["dedup"] = counts
        return kept

    # ------------------------------------------------------------ sides

    def split(self, rows: Rows, signed: Signed | None, kept: Flags) -> Flags:
        """Which rows are held out. Rows that are near-duplicates of the other side's are dropped from `kept`."""
        split = self.steps.split
        if self.steps.eval_sources or split.time:
            held = rows.held
        elif split.stratify_by:
            held = stratified_sides(rows.group, rows.stratum, split.share, rows=kept)
        else:
            held = sides(rows.group, split.share)
        straddling = 0
        if signed is not None and not self.steps.eval_sources:
            dropped = kept & resolve_straddling(signed.labels(), held, rows.characters, rows.id, rows=kept)
            straddling = int(dropped.sum())
            kept &= ~dropped
        self.done["split"] = {"how": "files of their own" if self.steps.eval_sources else split.how}
        self.done["split"] |= {"straddling": straddling} if straddling else {}
        return held

    def leaking(
        self, tasks: Sequence[chunks.Task], rows: Rows, signed: Signed | None, kept: Flags, held: Flags
    ) -> Flags:
        """Which training rows hold evaluation text and are to be dropped. Raises WhetErrors where the gate refuses."""
        none = np.zeros(len(rows), np.bool_)
        self.done["leaks"] = None
        if self.steps.leaks is None or signed is None:
            return none
        settings = self.steps.leaks
        evaluation = [replace(task, text=self.as_rows_are(task.text)) for task in self.asked]
        gate = Gate(tasks, rows.offsets(len(tasks)), signed, evaluation, self.store.cache / "leaks", self.each)
        found = gate.find(kept & ~held, kept & held)
        leaking = found.rows
        dropped = int(leaking.sum()) if settings.gate == "drop" else 0
        self.done["leaks"] = {
            "policy": settings.gate,
            **found.counts,
            "tasks": list(settings.tasks),
            "dropped": dropped,
        }
        if leaking.any() and settings.gate == "refuse":
            raise WhetErrors(found.faults())
        return leaking if settings.gate == "drop" else none

    def as_rows_are(self, text: str) -> str:
        """A task's text, cleaned and redacted like the rows that it is compared with."""
        text = clean(text, self.steps.clean) if self.steps.clean else text
        if self.steps.redact:
            row = chunks.redactor(self.steps.redact).row([text])
            text = text if row.dropped else row.texts[0]
        return text

    def check_sides(self, kept: Flags, held: Flags) -> None:
        counts = {"training": int((kept & ~held).sum()), "evaluation": int((kept & held).sum())}
        self.done["split"] |= {"train": counts["training"], "eval": counts["evaluation"]}
        for name, count in counts.items():
            if not count:
                raise WhetError(
                    f"all {sum(counts.values())} examples fall on one side: none is left for {name}",
                    where="data.split",
                    fix="add rows, change split.eval, group by a finer column, or try another seed",
                )

    # ------------------------------------------------------------ the version

    def write(
        self, tasks: Sequence[chunks.Task], made: Sequence[dict[str, Any]], rows: Rows, kept: Flags, held: Flags
    ) -> Version:
        order = np.lexsort((rows.id[:, 1], rows.id[:, 0]))
        ids = {side: _id_bytes(rows.id, order, kept & (held == (side == "eval"))) for side in SIDES}
        digest = digest_of_rows(self.steps.digest(), ids)
        version = Version(self.store.folder / digest[:SHOWN])
        if version.folder.is_dir():
            self.progress("write", 1, 1)
            version.check()
            return version
        with staged_folder(version.folder) as folder:
            parts = write.plan_parts(tasks, rows, kept, held, folder)
            written = self.each("write", write.write_part, parts)
            faults = write.in_order(fault for summary in made for fault in summary["faults"])
            if faults:
                write.quarantine(faults, folder / "quarantine.jsonl")
            if self.duplicates:
                write.list_duplicates(self.duplicates, tasks, rows, folder / "duplicates.jsonl")
            write.copy_vaults(tasks, folder)
            earlier = self.store.log()
            manifest = {
                "name": self.name,
                "digest": digest,
                "parent": earlier[-1]["digest"] if earlier else None,
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "recipe": self.steps.digest(),
                "seed": self.steps.seed,
                "sources": write.sources_of(tasks, made),
                "stages": self.done,
                "sides": write.sides_of(written),
                "files": write.files_of(written),
                "versions": {name: version_of(name) for name in ("whet", "ftfy", "rensa", "pyarrow", "numpy")},
            }
            write.write_manifest(manifest, folder)
        return version


def _are_small(tasks: Sequence[chunks.Task]) -> bool:
    """Not where a source is no file, and so of unknown size."""
    stamps = [stamp for task in tasks for stamp in task.chunk.stamps]
    return all(stamps) and sum(stamp[0] for stamp in stamps) < SMALL


def _labels(keys: NDArray[Any], held: Flags) -> NDArray[np.int64]:
    """A number for each different key [N] or [N, 2] on each side."""
    words = keys.reshape(len(keys), -1)
    order = np.lexsort([*words.T, held])
    new = np.ones(len(keys), np.bool_)
    ranked, side = words[order], held[order]
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1) | (side[1:] != side[:-1])
    labels = np.empty(len(keys), np.int64)
    labels[order] = np.cumsum(new) - 1
    return labels


def _id_bytes(ids: NDArray[np.uint64], order: NDArray[np.intp], chosen: Flags) -> Iterator[bytes]:
    for part in np.array_split(order[chosen[order]], 64):
        yield ids[part].astype(">u8").tobytes()
