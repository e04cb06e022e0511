"""What trackers are told of a run, read from its folder."""

from __future__ import annotations

from pathlib import Path

from whet.runs.report.record import Record, part, read_run
from whet.runs.report.settings import flat, written
from whet.runs.trackers.lines import Start


def start_of(folder: Path) -> Start:
    """The run in `folder`: its recipe as parameters; data, versions and commit as tags; the last step that was done."""
    record = read_run(folder)
    params = {key: written(key, value) for key, value in flat(record.recipe)}
    return Start(record.id, folder, params, _tags(record), int(record.steps[-1]["step"]) if record.steps else 0)


def digests_of(folder: Path) -> dict[str, str]:
    """STAGE/FILE -> SHA-256 of what the run made, from its receipts."""
    receipts = read_run(folder).receipts
    return {f"{stage}/{name}": digest for stage, files in receipts.items() for name, digest in files.items()}


def _tags(record: Record) -> dict[str, str]:
    facts = record.facts
    tags = {f"input.{name}": digest for name, digest in part(facts, "inputs").items()}
    tags |= {f"version.{name}": version for name, version in part(facts, "versions").items()}
    if git := part(facts, "git"):
        tags["git.commit"] = f"{git.get('commit')}{' with changes' if git.get('changed') else ''}"
    return {key: str(value) for key, value in tags.items()}
