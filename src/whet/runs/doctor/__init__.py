"""Examines a run's folder for what went wrong, names the cause, and says what to do about it.

    training.py      the steps' numbers: no number any more, rate too high or low, frozen adapter, spikes, fp16, memory
    heldout.py       held-out losses: overfitting, plateaus
    tokens.py        the rows trained on: duplicates, leaks of held-out rows, masked, cut and unreadable ones, template
    checkpoints.py   damaged checkpoints, an adapter that never moved

Nothing here loads a model. Findings hold no text of the rows.
"""

from __future__ import annotations

from pathlib import Path

from whet.runs.doctor.checkpoints import find_in_checkpoints
from whet.runs.doctor.findings import Cause, Finding, Severity, in_order, show, to_json
from whet.runs.doctor.heldout import find_in_heldout
from whet.runs.doctor.tokens import find_in_data
from whet.runs.doctor.training import Steps, find_in_training
from whet.runs.report.record import Record, read_run

__all__ = ["Cause", "Finding", "Severity", "examine", "show", "to_json"]


def examine(folder: Path) -> list[Finding]:
    """What is wrong with a run, the gravest first; one at most is primary. Raises WhetError where there is no run."""
    record = read_run(folder)
    found = [
        *_unreadable(record),
        *find_in_training(record.steps, record.lines("watch"), fp16=_fp16(record)),
        *find_in_heldout(record.lines("eval"), Steps.of(record.steps).loss),
        *find_in_data(record),
        *find_in_checkpoints(folder),
    ]
    return in_order(_without_doubles(found))


def _unreadable(record: Record) -> list[Finding]:
    """Files that are there and damaged. One that is missing belongs to a stage that is not done."""
    damaged = [missing for missing in record.missing if "can't be read" in missing.why or "damaged" in missing.why]
    return [
        Finding("warning", "unreadable run", missing.part, missing.why, "put the file back from a copy")
        for missing in damaged
    ]


def _fp16(record: Record) -> bool:
    model = record.recipe.get("model")
    return isinstance(model, dict) and model.get("dtype") == "float16"


def _without_doubles(findings: list[Finding]) -> list[Finding]:
    """One finding of each cause, the first: the numbers and the weights may tell of the same thing."""
    kept: dict[str, Finding] = {}
    for finding in findings:
        if finding.cause == "damaged checkpoint":
            kept[finding.where] = finding
        else:
            kept.setdefault(finding.cause, finding)
    return list(kept.values())
