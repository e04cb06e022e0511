"""The command line's verbs to look at runs: `whet runs report`, `whet runs compare`, `whet runs track`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from whet.errors import WhetError

console = Console(highlight=False)

Runs = Annotated[Path, typer.Option(help="Folder of the runs.")]


def report(
    run: Annotated[str, typer.Argument(help="The run: its folder, its name, or the beginning of its name.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write. Default: report.html in its folder.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write a run's report: curves, scores, samples, findings, recipe, versions. One HTML file, done or half done."""
    from whet.runs.doctor import examine, to_json
    from whet.runs.folders import find
    from whet.runs.report import read_run, write_report

    folder = find(runs, run)
    path = out or folder / "report.html"
    write_report(read_run(folder), path, findings=to_json(examine(folder)))
    console.print(f"[bold]wrote[/] {escape(str(path))}", soft_wrap=True)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two runs or more.")],
    out: Annotated[Path | None, typer.Option(help="The HTML file. Default: compare.html in --runs.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Lay runs over each other: their curves, their scores, and what their recipes say differently."""
    from whet.runs.folders import find
    from whet.runs.report import read_run, write_comparison

    path = out or runs / "compare.html"
    write_comparison([read_run(find(runs, name)) for name in names], path)
    console.print(f"[bold]wrote[/] {escape(str(path))}", soft_wrap=True)


def track(
    run: Annotated[str, typer.Argument(help="The run: its folder, its name, or the beginning of its name.")],
    mlflow: Annotated[str | None, typer.Option(help="`sqlite`, or the address of a server or a database.")] = None,
    wandb: Annotated[Literal["offline", "online"] | None, typer.Option(help="A file to send later, or now.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Event files in the run's folder.")] = False,
    project: Annotated[str, typer.Option(help="Experiment or project to send it to.")] = "whet",
    runs: Runs = Path("runs"),
) -> None:
    """Send a run that is over, or stopped, to MLflow, Weights & Biases or TensorBoard."""
    from whet.runs.folders import find
    from whet.runs.report import read_run
    from whet.runs.trackers import Tracking, digests_of, send, start_of

    if not (mlflow or wandb or tensorboard):
        raise WhetError("no tracker is named", where="whet runs track", fix="add --mlflow sqlite")
    folder = find(runs, run)
    record = read_run(folder)
    tracking = Tracking(mlflow=mlflow, wandb=wandb, tensorboard=tensorboard, project=project)
    digests = digests_of(folder)
    send(tracking, start_of(folder), record.metrics, "stopped" if record.waited_for else "done", digests)
    console.print(f"[bold]sent[/] {len(record.metrics):,} lines of {escape(folder.name)}", soft_wrap=True)
