"""The whole journey: recipe -> data -> (smoke) -> train -> eval -> gate -> export, each stage in its own folder.

A stage whose folder is there is not run again, so a run that was stopped goes on where it was. Every stage is told to
the ledger and to the trackers; report.html is written when the run ends, however it ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape

from whet import recipe_evals, stages
from whet.data.prepare import rows
from whet.data.template import Tokenized, preview
from whet.export.gguf_model import check_convertible
from whet.export.merge_layout import layout_of
from whet.export.merge_stream import form_of
from whet.export_run import wanted_of
from whet.files import sha256, write_text
from whet.models.compute import check_compute
from whet.recipe import Recipe
from whet.recipe_data import prepare_data, version_of
from whet.recipe_evals import tasks_of
from whet.recipe_model import config_of, tokenizer_of
from whet.runs.doctor import examine, to_json
from whet.runs.report import read_run, write_report
from whet.runs.store import Run
from whet.runs.trackers import Tracking, following
from whet.stages import Summary


class Refused(Exception):
    """The gate said no: the model is not exported. Its checks are in RUN/eval/gate.json."""


def run_recipe(recipe: Recipe, base: Path, root: Path, console: Console, *, smoke: bool = False) -> Run:
    """Do all that `recipe` says, from where an earlier call stopped. Its paths start at `base`; runs lie in `root`.

    smoke: train on a tenth of the rows first. Raises WhetError, and Refused where the gate says no.
    """
    check_export(recipe)
    tasks = tasks_of(recipe, base)
    version = version_of(recipe, base, root, console)
    run = Run.open(recipe, base, root, version.digest)
    refusal = None
    try:
        console.print(f"[bold]{recipe.name}[/] in {escape(str(run.folder))}", soft_wrap=True)
        if not (run.folder / "trained").exists():
            check_compute(recipe.model.compute)
        with _followed(run):
            _stage(run, console, "data", lambda folder: stages.make_data(recipe, version, folder, console))
            if smoke:
                _stage(run, console, "smoke", lambda folder: stages.try_out(run, folder, console))
            _stage(run, console, "trained", lambda folder: stages.train(run, tasks, folder, console))
            if recipe.eval:
                _stage(run, console, "eval", lambda folder: stages.evaluate(run, tasks, base, folder, console))
                refusal = _refusal(run, root, console)
            if refusal is None:
                export = lambda folder: stages.export(run, folder, console)  # noqa: E731
                _stage(run, console, "export", export, seal=stages.seal_export)
    finally:
        run.close()
    if refusal is not None:
        raise Refused(refusal)
    return run


def dry_run(recipe: Recipe, base: Path, console: Console) -> None:
    """Read the data, tokenize it and show the first row as the model will see it; write and train nothing."""
    check_export(recipe)
    tasks_of(recipe, base)
    tokenizer = tokenizer_of(recipe.model)
    with TemporaryDirectory() as folder:
        version = version_of(recipe, base, Path(folder), console)
        _show(console, "data", prepare_data(recipe, tokenizer, version, Path(folder), console))
        first = rows(Path(folder), "heldout")[0]
    console.print(preview(tokenizer, Tokenized(first["input_ids"], first["labels"], truncated=False)))
    tokens = recipe.rows_per_step * recipe.model.max_seq_length
    console.print(f"[green]{'train':<8}[/]{recipe.train.method}, {tokens} tokens a step; nothing was written")


def check_export(recipe: Recipe) -> None:
    """Refuse what can't be exported, or not be proven on this machine, before it is trained."""
    if (wanted := wanted_of(recipe.export)) is None:
        return
    if wanted.gguf or wanted.gguf_adapter:
        check_convertible(config_of(recipe.model), tokenizer_of(recipe.model))
    if wanted.merged:
        form_of(wanted.merged, layout_of(config_of(recipe.model)))
    wanted.check(unproven="say `proof: false` under the recipe's `export:`")


@contextmanager
def _followed(run: Run) -> Iterator[None]:
    """Trackers are told of every line of metrics while this lasts; the report is written after it."""
    track = run.recipe.track
    tracking = Tracking(mlflow=track.mlflow, wandb=track.wandb, tensorboard=track.tensorboard, project=track.project)
    with following(tracking, run.folder) as trackers:
        run.followers.append(trackers.log)
        try:
            yield
        finally:
            write_report(read_run(run.folder), run.folder / "report.html", findings=to_json(examine(run.folder)))


def _refusal(run: Run, root: Path, console: Console) -> str | None:
    """The gate's verdict where the model does not ship; None where it does, or there is no gate. The ledger is told."""
    path = run.folder / "eval" / "gate.json"
    decision = recipe_evals.gate(run.recipe, path.parent, root)
    if decision is None:
        return None
    recipe_evals.tell(decision, run.ledger, run.id, {"eval/gate.json": sha256(path)})
    console.print(decision.table())
    return None if decision.ship else decision.verdict


def _stage(
    run: Run,
    console: Console,
    name: str,
    work: Callable[[Path], Summary],
    seal: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Do a stage unless it is done; its summary is kept in its folder and shown either way. seal: done after that."""

    def build(folder: Path) -> None:
        write_text(folder / "summary.json", json.dumps(work(folder), indent=1))
        seal(folder)

    folder, built = run.stage(name, build)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    _show(console, name, summary, "" if built else "  [dim](done before)[/]")


def _show(console: Console, name: str, summary: Summary, note: str = "") -> None:
    shown = "  ".join(f"{key} [bold]{value}[/]" for key, value in summary.items())
    console.print(f"[green]{name:<8}[/]{shown}{note}", soft_wrap=True)
