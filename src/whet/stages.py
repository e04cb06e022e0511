"""The stages of a recipe's journey, one function each: from what lies in the run's folder to what the stage leaves.

Each writes into a folder of its own, which appears when it is done, and returns a summary: names and numbers to show.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from whet import recipe_evals
from whet.data import fingerprint
from whet.data.prep.versions import SHOWN, Version
from whet.data.prepare import questions, rows
from whet.errors import WhetError
from whet.evals.heldout import compare, mean_loss
from whet.evals.models import InMemory
from whet.export.bundle import LIST
from whet.export.checksums import write_checksums
from whet.export_run import export_stage, wanted_of
from whet.models.fused import path_of, shared_of
from whet.recipe import Recipe
from whet.recipe_data import prepare_data
from whet.recipe_evals import AtCheckpoints, Tasks
from whet.recipe_model import load_base, load_for_training, load_tuned, tokenizer_of
from whet.runs.plots import plot_loss
from whet.runs.store import Run
from whet.train.fit import fit
from whet.train.smoke import smoke
from whet.train.watch import EarlyStop, Watching

Summary = dict[str, Any]


def make_data(recipe: Recipe, version: Version, folder: Path, console: Console) -> Summary:
    """Tokenize and pack: train-*.arrow and heldout-*.arrow (token ids), questions-*.jsonl (prompts and references)."""
    tokenizer = tokenizer_of(recipe.model)
    summary = prepare_data(recipe, tokenizer, version, folder, console)
    fingerprint.keep(fingerprint.fingerprint(tokenizer), folder)
    for name in ("manifest.json", "card.html"):
        shutil.copyfile(version.folder / name, folder / name)
    return {"version": version.digest[:SHOWN], **summary}


def try_out(run: Run, folder: Path, console: Console) -> Summary:
    """Train on a tenth of the rows first. Raises WhetError where that fails."""
    model, tokenizer = load_for_training(run.recipe)
    return smoke(run.recipe, model, tokenizer, rows(run.folder / "data", "train"), folder, console)


def train(run: Run, tasks: Tasks, folder: Path, console: Console) -> Summary:
    """Fine-tune on the run's rows: the adapter, or the whole model where there is none, and loss.png."""
    model, tokenizer = load_for_training(run.recipe)
    found = fingerprint.check(tokenizer, run.folder / "data", "the data was made with")
    heldout = rows(run.folder / "data", "heldout")
    fit(
        model,
        tokenizer,
        rows(run.folder / "data", "train"),
        run,
        console,
        watching=watching_of(run.recipe),
        heldout=(lambda: mean_loss(model, heldout)) if run.recipe.train.early_stop else None,
        callbacks=[AtCheckpoints(run, tokenizer, tasks)],
    )
    run.record("memory", memory_of(model))
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    fingerprint.keep(found, folder)
    steps = run.metrics("train")
    try:
        plot_loss(steps, folder / "loss.png", title=run.recipe.name)
    except WhetError as error:  # what was learned is worth more than its picture
        console.print(f"[yellow]no loss.png:[/] {escape(error.what)}; {escape(error.fix or '')}")
    losses = {"first loss": round(steps[0]["loss"], 4), "last loss": round(steps[-1]["loss"], 4)}
    return {"steps": len(steps), **losses, "layers": path_of(model)}


def memory_of(model: Any) -> dict[str, Any]:
    """The plan of what training takes on the GPU, in words, and what it took, in bytes; None on a CPU."""
    shared = shared_of(model)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"planned": getattr(shared, "plan", None), "measured": peak}


def watching_of(recipe: Recipe) -> Watching:
    """What becomes of a step that makes no number, and when training stops early."""
    stop = recipe.train.early_stop
    return Watching(on_nan=recipe.train.on_nan, early_stop=EarlyStop(stop.patience, stop.min_gain) if stop else None)


def evaluate(run: Run, tasks: Tasks, base: Path, folder: Path, console: Console) -> Summary:
    """Base and tuned model on the same held-out rows and tasks; answers.jsonl, tasks/, text/."""
    settings = run.recipe.eval
    assert settings is not None
    model, tokenizer = load_tuned(run.recipe, run.folder / "trained")
    comparison = compare(
        model,
        tokenizer,
        rows(run.folder / "data", "heldout"),
        questions(run.folder / "data", settings.limit if settings.exact_match else 0),
        base=None if run.recipe.adapter else (lambda: load_base(run.recipe.model)[0]),
        max_new_tokens=settings.max_new_tokens,
        batch=settings.batch,
        console=console,
    )
    comparison.save(folder / "answers.jsonl")
    run.log(stage="eval", **comparison.scores)
    original = model if run.recipe.adapter else load_base(run.recipe.model)[0]
    sides = (
        InMemory(model, tokenizer, "tuned", settings.batch),
        InMemory(original, tokenizer, "base", settings.batch, adapter=not run.recipe.adapter),
    )
    return comparison.summary | recipe_evals.evaluate(run, tasks, base, folder, sides)


def export(run: Run, folder: Path, console: Console) -> Summary:
    """What the recipe asks for besides the adapter, compared with the tuned model. See `bundle` for what is in it."""
    wanted = wanted_of(run.recipe.export)
    if wanted is None:
        return {}
    with console.status("loading the model") as status:
        made = export_stage(run.folder, folder, run.recipe, wanted, progress=lambda step: status.update(escape(step)))
    proof = "passed" if wanted.proven else "left out"
    return {one.path: f"{one.nbytes / 1e6:.1f} MB" for one in made} | {"proof": proof}


def seal_export(folder: Path) -> None:
    """Write the export's checksums, over its summary too."""
    if (folder / LIST).is_file():
        write_checksums(folder)
