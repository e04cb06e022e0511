"""The command line's verb for what went wrong in a run: `whet doctor run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)

Root = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
Name = Annotated[str, typer.Argument(help="A run: its id, the beginning of it, or its folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of text.")]


def doctor_run(run: Name, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Say what went wrong in a run, the cause first. Exits with 1 if something did."""
    from whet.runs.doctor import examine, show, to_json
    from whet.runs.folders import find

    findings = examine(find(root, run))
    if as_json:
        print(json.dumps(to_json(findings), indent=1))
    else:
        show(findings, console)
    raise typer.Exit(1 if any(finding.severity != "note" for finding in findings) else 0)
