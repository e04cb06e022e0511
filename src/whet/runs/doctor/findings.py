"""What the doctor of runs says: findings, the one that explains the others, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from rich.console import Console
from rich.markup import escape
from rich.text import Text

Severity = Literal["error", "warning", "note"]

SEVERITIES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}
"""The gravest first, and how each is coloured."""

Cause = Literal[
    "unreadable rows",
    "nothing to learn from",
    "wrong template",
    "damaged weights",
    "frozen adapter",
    "bad batch",
    "fp16 range",
    "learning rate too high",
    "learning rate too low",
    "exploding gradients",
    "not a number",
    "leaking evaluation",
    "duplicated data",
    "cut rows",
    "overfitting",
    "loss spike",
    "plateau",
    "damaged checkpoint",
    "memory fragmentation",
    "unreadable run",
]
"""What can be wrong. One that comes earlier here may bring about one that comes later: it is looked at first."""

CAUSES: tuple[Cause, ...] = get_args(Cause)


@dataclass(frozen=True)
class Finding:
    """severity: an error ruins the run; a warning costs quality or time; a note is for information.

    where: the file, rows, layer or steps. step: the optimizer step at which it began, where it has one.
    what: what was seen, with its numbers. advice: what to do. primary: whether it explains the run's other findings.
    """

    severity: Severity
    cause: Cause
    where: str
    what: str
    advice: str
    step: int | None = None
    primary: bool = False


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The gravest first, of equal ones the likelier cause of the others; the first is primary, unless it is a note."""
    gravest = list(SEVERITIES)
    found = sorted(findings, key=lambda f: (gravest.index(f.severity), CAUSES.index(f.cause), f.step or 0))
    if found and found[0].severity != "note":
        found[0] = replace(found[0], primary=True)
    return found


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Plain JSON values, one object a finding."""
    return [asdict(finding) for finding in findings]


def show(findings: Sequence[Finding], console: Console) -> None:
    """Each finding in a few lines, the primary one first."""
    if not findings:
        console.print("nothing found")
        return
    for finding in findings:
        heading = Text(finding.cause, style="bold")
        heading.append(f"  {finding.severity}", style=SEVERITIES[finding.severity])
        if finding.primary:
            heading.append("  the primary cause", style="bold")
        console.print(heading)
        console.print(f"  [cyan]{escape(finding.where)}[/]", soft_wrap=True)
        console.print(f"  {escape(finding.what)}", soft_wrap=True)
        console.print(f"  [green]fix[/] {escape(finding.advice)}\n", soft_wrap=True)
