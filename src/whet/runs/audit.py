"""Whether the runs are what the ledger says: every receipt has its event, every file the digest that it had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from whet.errors import WhetError
from whet.runs import ledger
from whet.runs.folders import at_work, run_folders
from whet.runs.ledger import Event
from whet.runs.receipts import FOLDER, RUN, Receipt, added, changes, read_receipts
from whet.runs.verify import Anchor, Fault, verify

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

OPENED, RECORDED, PRUNED = "run.opened", "run.recorded", "run.pruned"


@dataclass
class Told:
    """What the ledger tells of one run. made: the latest event of each stage that is done, and of the run's own files.

    others: SHA-256 of files that another event says it wrote, by path in the run's folder, as eval/gate.json.
    metrics: the event that last said what metrics.jsonl held; None when a stage began after it, which may rewrite it.
    """

    made: dict[str, Event] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    metrics: Event | None = None
    pruned: bool = False

    def add(self, event: Event) -> None:
        if event.what == OPENED:
            self.made, self.others, self.metrics, self.pruned = {RUN: event}, {}, None, False
        elif event.what == RECORDED:
            self.made[RUN] = event
        elif event.what == PRUNED:
            self.made, self.others, self.metrics, self.pruned = {}, {}, None, True
        elif isinstance(folder := event.facts.get("folder"), str) and event.what.endswith(".started"):
            self.metrics = None
        elif isinstance(folder, str) and event.what.endswith(".done"):
            self.made[folder] = self.metrics = event
            self.others = {path: digest for path, digest in self.others.items() if not path.startswith(f"{folder}/")}
        else:
            self.others |= {path: digest for path, digest in event.outputs.items() if "/" in path}

    def files(self, stage: str) -> dict[str, str]:
        """SHA-256 by path of what is to be in a stage's folder."""
        start = f"{stage}/"
        others = {p.removeprefix(start): digest for p, digest in self.others.items() if p.startswith(start)}
        return dict(self.made[stage].outputs) | others


def audit(
    root: Path,
    *,
    public_key: Ed25519PublicKey | None = None,
    since: Anchor | None = None,
    every_signature: bool = False,
    files: bool = True,
) -> list[Fault]:
    """The faults of the ledger under `root` (see `verify`), then those of the runs beside it.

    files: also read every file that a stage made. Runs that a process is at work on are left out.
    Raises WhetError when there is no ledger.
    """
    path = root / ledger.NAME
    faults = verify(path, public_key=public_key, since=since, every_signature=every_signature)
    told, hashes = _tell(path)
    folders = {folder.name: folder for folder in run_folders(root)}
    for name in sorted(told.keys() | folders.keys()):
        folder, known = root / name, told.get(name, Told())
        if name in folders and not at_work(folder):
            faults += _folder_faults(folder, known, hashes, files)
        elif name not in folders and known.made:
            faults.append(
                Fault(str(folder), f"the run is gone, and no event tells so; to tell: whet runs prune {name} --yes")
            )
    return faults


def _tell(path: Path) -> tuple[dict[str, Told], dict[int, str]]:
    """What the ledger tells of each run, and the SHA-256 of each event by its place. `verify` names damaged lines."""
    told: dict[str, Told] = {}
    hashes = {}
    with open(path, "rb") as file:
        for line in file:
            try:
                event = ledger.parse(line, str(path))
            except WhetError:
                continue
            hashes[event.seq] = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
            if event.run:
                told.setdefault(event.run, Told()).add(event)
    return told, hashes


def runs_told(path: Path) -> dict[str, Told]:
    """What the ledger at `path` tells of each run, by its id."""
    return _tell(path)[0]


def _folder_faults(folder: Path, told: Told, hashes: Mapping[int, str], files: bool) -> Iterator[Fault]:
    """What of a run is not as the ledger tells."""
    if told.pruned:
        yield Fault(str(folder), "the ledger tells that this run was removed")
    try:
        receipts = read_receipts(folder)
    except WhetError as error:
        yield Fault(error.where or str(folder), error.what)
    else:
        yield from (Fault(str(folder / FOLDER), what) for what in _receipt_faults(receipts, told, hashes))
    for stage in told.made:
        place = folder if stage == RUN else folder / stage
        if not place.is_dir():
            yield Fault(str(place), "is missing: removed, or its process died as it was done; run the recipe again")
        elif files:
            known = told.files(stage)
            found = changes(place, known) + (added(place, known) if stage != RUN else [])
            yield from (Fault(where, what) for where, what in found)
    if told.metrics is not None:
        yield from _metrics_faults(folder / "metrics.jsonl", told.metrics)


def _receipt_faults(receipts: Mapping[str, Receipt], told: Told, hashes: Mapping[int, str]) -> Iterator[str]:
    """Receipts whose events are not in the ledger (it was cut, changed, or put back to an older state), or not last."""
    for stage, receipt in receipts.items():
        if hashes.get(receipt.event) != receipt.hash:
            yield f"the ledger does not hold the event {receipt.event} that the receipt of {stage} is for"
    for stage, event in told.made.items():
        if (kept := receipts.get(stage)) is None:
            yield f"the receipt of {stage} is missing"
        elif kept != Receipt.of(event):
            yield f"the receipt of {stage} is not the one that the ledger tells of"


def _metrics_faults(path: Path, event: Event) -> Iterator[Fault]:
    """Lines may be added to the metrics that a stage left; those that were there must stay."""
    left = event.facts.get("metrics")
    if not isinstance(left, dict) or not isinstance(length := left.get("bytes"), int) or length <= 0:
        return
    try:
        with open(path, "rb") as file:
            content = file.read(length)
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != left.get("sha256"):
        yield Fault(str(path), f"lines that {event.what.removesuffix('.done')} left were changed or removed")
