"""Several runs side by side: their curves laid over each other, what they scored, and what set them apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.files import refused_when_full
from whet.pages import write_page
from whet.pages.charts import COLOURS
from whet.pages.numbers import compact, count, duration, gib, three
from whet.runs.report.curves import numbers, overlaid_charts
from whet.runs.report.page import Score, moment, scores, status
from whet.runs.report.record import Record
from whet.runs.report.settings import differences

TEMPLATE = Path(__file__).with_name("compare.html.jinja")


def write_comparison(records: Sequence[Record], path: Path) -> None:
    """Write the comparison of two runs or more, COLOURS at most, to one HTML file. No text of records is in it."""
    if not 2 <= len(records) <= COLOURS:
        raise WhetError(f"{len(records)} runs can't be compared", where="RUN", fix=f"name 2 to {COLOURS} runs")
    title = "Runs compared: " + ", ".join(record.id for record in records)
    with refused_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(path, TEMPLATE, title=title, **_view(records))


def _view(records: Sequence[Record]) -> dict[str, Any]:
    tasks: dict[str, dict[int, list[Score]]] = {}
    for i, record in enumerate(records):
        for score in scores(record):
            tasks.setdefault(score.task, {}).setdefault(i, []).append(score)
    return {
        "records": records,
        "rows": _rows(records),
        "recipe": differences([record.recipe for record in records]),
        "around": _around(records),
        "charts": overlaid_charts(records),
        "tasks": sorted(tasks.items()),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "three": three,
    }


def _rows(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """What came of each run, a row a fact and a value a run; facts that no run has are left out."""
    known = [numbers(record) for record in records]
    rows = [
        ("state", [status(record)[0] for record in records]),
        ("started", [moment(record.facts.get("started")) for record in records]),
    ]
    shown: list[tuple[str, str, Callable[[Any], str]]] = [
        ("steps", "optimizer steps", count),
        ("loss", "loss, mean of the last steps", compact),
        ("lowest", "lowest loss of a step", compact),
        ("tokens", "tokens learned from", compact),
        ("speed", "tokens a second, median", lambda speed: count(round(speed))),
        ("memory", "memory, highest", gib),
        ("seconds", "spent on steps", duration),
    ]
    rows += [(label, [show(k[name]) if name in k else "" for k in known]) for name, label, show in shown]
    return [(label, values) for label, values in rows if any(values)]


def _around(records: Sequence[Record]) -> list[tuple[str, list[Any]]]:
    """Differences besides the recipe's: the inputs, the versions, the hardware, the code."""
    parts = (("inputs", "Input"), ("versions", "Version of"), ("hardware", "Hardware"), ("git", "Git"))
    found = []
    for part, title in parts:
        if rows := differences([record.facts.get(part) or {} for record in records]):
            found.append((title, rows))
    return found
