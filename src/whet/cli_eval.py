"""`whet eval`: puts evaluation tasks to a model and shows what its answers are worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from whet.errors import WhetError

if TYPE_CHECKING:
    from whet.evals.models import Model
    from whet.evals.run_tasks import Progress

console = Console(highlight=False)
WIDE = 120
"""Characters of a table that goes to a file."""


def evaluate(
    tasks: Annotated[list[str], typer.Argument(help="Task files or globs, as evals/*.yaml.")],
    model: Annotated[str | None, typer.Option(help="A model's or an adapter's folder, or builtin:NAME.")] = None,
    run: Annotated[str | None, typer.Option(help="A run, for what it has trained.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, as http://HOST/v1.")] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="The server's name for the model.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the server's key.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write results to, a file a task.")] = None,
    compare: Annotated[
        str | None, typer.Option(help="Results in a folder, a run, a model, or `base`: the model without its adapter.")
    ] = None,
    load: Annotated[Literal["16bit", "32bit", "int8", "nf4"], typer.Option(help="How --model is held.")] = "16bit",
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    allow_python: Annotated[
        bool, typer.Option("--allow-python", help="Let tasks run Python that they name. Read it first.")
    ] = False,
    gate: Annotated[
        bool, typer.Option("--gate", help="Decide whether --run ships, against --compare. Exits with 1 where not.")
    ] = False,
    rules: Annotated[Path | None, typer.Option(help="YAML file of the gate's rules, in place of the recipe's.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Evaluate a model on tasks: a table with intervals, and every answer in --out."""
    from whet.cli_quiet import quiet_libraries
    from whet.eval_models import kept_results, other_model
    from whet.evals.run_tasks import run_tasks
    from whet.evals.table import comparison_table, power_notes, results_table
    from whet.evals.tasks import load_tasks

    quiet_libraries()
    if gate and (run is None or compare is None):
        fix = "whet eval TASKS --run RUN --compare base --gate"
        raise WhetError("the gate decides on a run, compared with something", where="--gate", fix=fix)
    if gate:
        from whet.eval_gate import rules_of

        held_to = rules_of(rules, str(run), runs)
    loaded = load_tasks(tasks, allow_python=allow_python)
    other = kept_results(compare) if compare else None
    asked = _model(model, run, endpoint, endpoint_model, key_env, load, batch, runs)
    with _progress() as progress:
        results = run_tasks(
            loaded,
            asked,
            progress=progress,
            done=lambda result: result.save(out / f"{result.task}.jsonl") if out else None,
        )
        if compare and other is None:
            other = run_tasks(loaded, other_model(compare, asked, runs, held=load), progress=progress)
    shown = (
        comparison_table(results, other, confidence=confidence)
        if other
        else results_table(results, confidence=confidence)
    )
    console.print(shown, width=None if console.is_terminal else WIDE, crop=False)
    if other:
        for note in power_notes(other, confidence):
            console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    for result in results.values():
        for name, value in result.measures.items():
            console.print(f"[dim]{escape(result.task)}: {escape(name)} {value:.4g}[/]", soft_wrap=True)
    if out:
        console.print(f"[bold]wrote[/] {escape(str(out))}", soft_wrap=True)
    if gate:
        from whet.eval_gate import decide_on_run

        decision = decide_on_run(str(run), runs, held_to, results, other or {})
        console.print(decision.table())
        raise typer.Exit(decision.exit_code)


def _model(
    model: str | None,
    run: str | None,
    endpoint: str | None,
    endpoint_model: str | None,
    key_env: str | None,
    held: str,
    batch: int,
    runs: Path,
) -> Model:
    from whet.eval_models import model_at, model_in, model_of_run

    given = [
        name for name, value in (("--model", model), ("--run", run), ("--endpoint", endpoint)) if value is not None
    ]
    if len(given) != 1:
        what = f"{' and '.join(given)} name several models" if given else "no model is named"
        raise WhetError(what, where="whet eval", fix="give one of --model, --run and --endpoint")
    if endpoint is not None:
        return model_at(endpoint, endpoint_model, key_env, batch)
    return model_of_run(run, runs, batch=batch) if run is not None else model_in(str(model), held=held, batch=batch)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for each task while it is answered, on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        shown = {}

        def progress(task: str, done: int, total: int) -> None:
            if task not in shown or done == 0:
                shown[task] = bars.add_task(escape(task), total=total)
            bars.update(shown[task], completed=done, total=total)

        yield progress
