"""The command line's verbs for a training's health: `whet doctor run`, `whet doctor rate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

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


def doctor_rate(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for rates.json and rates.png.")] = Path("."),
    root: Root = Path("runs"),
    lowest: Annotated[float, typer.Option(help="The first step's learning rate.")] = 1e-6,
    highest: Annotated[float, typer.Option(help="The last step's learning rate.")] = 1e-1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 60,
) -> None:
    """Find a learning rate: a range test on the recipe's model and data. Exits with 1 where no rate lowers the loss."""
    from whet.cli_quiet import quiet_libraries
    from whet.recipe import load

    checked = load(recipe)
    quiet_libraries()
    from whet.find_rate import JSON, PLOT, find_rate

    found = find_rate(checked, recipe.parent, root, out, console, lowest=lowest, highest=highest, steps=steps)
    where = escape(f"{out / JSON}, {out / PLOT}")
    if found.suggested is None:
        tried = f"{found.rates[0]:.0e} to {found.rates[-1]:.0e}"
        console.print(
            f"[yellow]no rate from {tried} lowered the loss by 2% and by more than batches differ[/]; {where}",
            soft_wrap=True,
        )
        console.print("  try --highest above it, more --steps, or `whet doctor data` on the rows")
        raise typer.Exit(1)
    ended = f"; the loss diverged at {found.diverged:.1e}" if found.diverged is not None else ""
    console.print(f"[bold]train.learning_rate: {found.suggested:.1e}[/]{ended}; {where}", soft_wrap=True)
