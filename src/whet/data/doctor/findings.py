"""What the doctor says: findings, and how they are shown in a terminal or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

Severity = Literal["error", "warning", "note"]

SEVERITIES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}
"""The gravest first, and how each is coloured."""

PLACES = 5
"""Places that are named of each finding."""

WIDTH = 80
"""Characters of an excerpt."""


class Place(NamedTuple):
    """where: file:line. detail: another place, or a class; never a record's text. excerpt: a record's, if asked for."""

    where: str
    detail: str = ""
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.where} ({self.detail})" if self.detail else self.where


@dataclass(frozen=True)
class Finding:
    """check: the check's name. places: every row concerned, in the order of the rows; none where it is the whole set.

    what: what was found and what it does to a model. advice: what to do.
    """

    check: str
    severity: Severity
    places: tuple[Place, ...]
    what: str
    advice: str

    @property
    def rows(self) -> int:
        return len(self.places)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first; else as the checks came."""
    order = list(SEVERITIES)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def by_share(rows: int, total: int, *, warning: float) -> Severity:
    """A warning from that share of the rows on, a note below."""
    return "warning" if rows >= warning * total else "note"


def to_json(findings: Sequence[Finding], *, places: int | None = PLACES) -> list[dict[str, Any]]:
    """Plain JSON values, one object a finding. places: how many are listed of each; None: all."""
    return [
        {
            "check": finding.check,
            "severity": finding.severity,
            "rows": finding.rows,
            "places": [
                {name: value for name, value in place._asdict().items() if value} for place in finding.places[:places]
            ],
            "what": finding.what,
            "advice": finding.advice,
        }
        for finding in findings
    ]


def show(findings: Sequence[Finding], console: Console) -> None:
    """A table of the findings, and a line that sums them up."""
    if not findings:
        console.print("nothing found")
        return
    table = Table(box=None, padding=(0, 2, 1, 0), show_header=False, expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for finding in findings:
        table.add_row(_heading(finding), _said(finding))
    console.print(table)
    counts = Counter(finding.severity for finding in findings)
    console.print(", ".join(f"{counts[name]} {name}{'s' * (counts[name] != 1)}" for name in SEVERITIES if counts[name]))


def _heading(finding: Finding) -> RichText:
    heading = RichText(finding.check, style="bold")
    heading.append(f"\n{finding.severity}", style=SEVERITIES[finding.severity])
    if finding.places:
        heading.append(f"\n{finding.rows:,} {'row' if finding.rows == 1 else 'rows'}", style="not bold")
    return heading


def _said(finding: Finding) -> RichText:
    said = RichText(finding.what)
    named = finding.places[:PLACES]
    more = f"and {finding.rows - len(named):,} more" if finding.rows > len(named) else ""
    if any(place.excerpt for place in named):
        for place in named:
            said.append(f"\n{printable(str(place))}  ", style="cyan").append(printable(place.excerpt), style="dim")
        said.append(f"\n{more}" * bool(more), style="cyan")
    elif named:
        said.append("\n" + ", ".join([*(printable(str(place)) for place in named), *[more] * bool(more)]), style="cyan")
    return said.append("\nfix ", style="green").append(finding.advice)


def printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def excerpt(text: str, start: int = 0, end: int = 0) -> str:
    """Some `WIDTH` characters of the text, with what stands from `start` to `end` in their middle, on one line."""
    first = max(0, min((start + end - WIDTH) // 2, len(text) - WIDTH))
    shown = printable(text[first : first + WIDTH])
    return f"{'…' * (first > 0)}{shown}{'…' * (first + WIDTH < len(text))}"
