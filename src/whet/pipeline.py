"""The whole journey: recipe -> data -> train -> eval -> export, each stage in its own folder of the run.

A stage whose folder is there is not run again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from whet.data import fingerprint
from whet.data.prep.versions import SHOWN, Version
from whet.data.prepare import questions, rows
from whet.data.template import Tokenized, preview
from whet.errors import WhetError
from whet.evals.heldout import compare
from whet.export.gguf_model import check_convertible, save_gguf
from whet.export.merge import save_merged
from whet.files import write_text
from whet.models.compute import check_compute
from whet.models.fused import path_of
from whet.recipe import Recipe
from whet.recipe_data import prepare_data, version_of
from whet.recipe_model import config_of, load_base, load_for_training, load_tuned, tokenizer_of
from whet.runs.plots import plot_loss
from whet.runs.store import Run
from whet.train.fit import fit

Summary = dict[str, Any]
MERGED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": torch.bfloat16}


def run_recipe(recipe: Recipe, base: Path, root: Path, console: Console) -> Run:
    """Do all that `recipe` says, from where an earlier call stopped. Its paths start at `base`; runs lie in `root`."""
    check_export(recipe)
    version = version_of(recipe, base, root, console)
    run = Run.open(recipe, base, root, version.digest)
    try:
        console.print(f"[bold]{recipe.name}[/] in {escape(str(run.folder))}", soft_wrap=True)
        if not (run.folder / "trained").exists():
            check_compute(recipe.model.compute)
        _stage(run, console, "data", lambda folder: make_data(recipe, version, folder, console))
        _stage(run, console, "trained", lambda folder: train(run, folder, console))
        if recipe.eval:
            _stage(run, console, "eval", lambda folder: evaluate(run, folder, console))
        _stage(run, console, "export", lambda folder: export(run, folder))
    finally:
        run.close()
    return run


def dry_run(recipe: Recipe, base: Path, console: Console) -> None:
    """Read the data, tokenize it and show the first row as the model will see it; write and train nothing."""
    check_export(recipe)
    tokenizer = tokenizer_of(recipe.model)
    with TemporaryDirectory() as folder:
        version = version_of(recipe, base, Path(folder), console)
        _show(console, "data", prepare_data(recipe, tokenizer, version, Path(folder), console))
        first = rows(Path(folder), "heldout")[0]
    console.print(preview(tokenizer, Tokenized(first["input_ids"], first["labels"], truncated=False)))
    tokens = recipe.rows_per_step * recipe.model.max_seq_length
    console.print(f"[green]{'train':<8}[/]{recipe.train.method}, {tokens} tokens a step; nothing was written")


def check_export(recipe: Recipe) -> None:
    """Refuse what can't be exported before it is trained."""
    if recipe.export.gguf:
        check_convertible(config_of(recipe.model), tokenizer_of(recipe.model))


def _stage(run: Run, console: Console, name: str, work: Callable[[Path], Summary]) -> None:
    """Do a stage unless it is done; its summary is kept in its folder and shown either way."""

    def build(folder: Path) -> None:
        write_text(folder / "summary.json", json.dumps(work(folder), indent=1))

    folder, built = run.stage(name, build)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    _show(console, name, summary, "" if built else "  [dim](done before)[/]")


def _show(console: Console, name: str, summary: Summary, note: str = "") -> None:
    shown = "  ".join(f"{key} [bold]{value}[/]" for key, value in summary.items())
    console.print(f"[green]{name:<8}[/]{shown}{note}", soft_wrap=True)


def make_data(recipe: Recipe, version: Version, folder: Path, console: Console) -> Summary:
    """Tokenize and pack: train-*.arrow and heldout-*.arrow (token ids), questions-*.jsonl (prompts and references)."""
    tokenizer = tokenizer_of(recipe.model)
    summary = prepare_data(recipe, tokenizer, version, folder, console)
    fingerprint.keep(fingerprint.fingerprint(tokenizer), folder)
    for name in ("manifest.json", "card.html"):
        shutil.copyfile(version.folder / name, folder / name)
    return {"version": version.digest[:SHOWN], **summary}


def train(run: Run, folder: Path, console: Console) -> Summary:
    """Fine-tune on the run's rows: the adapter, or the whole model where there is none, and loss.png."""
    model, tokenizer = load_for_training(run.recipe)
    found = fingerprint.check(tokenizer, run.folder / "data", "the data was made with")
    fit(model, tokenizer, rows(run.folder / "data", "train"), run, console)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fingerprint.keep(found, folder)
    steps = run.metrics("train")
    try:
        plot_loss(steps, folder / "loss.png", title=run.recipe.name)
    except WhetError as error:  # what was learned is worth more than its picture
        console.print(f"[yellow]no loss.png:[/] {escape(error.what)}; {escape(error.fix or '')}")
    losses = {"first loss": round(steps[0]["loss"], 4), "last loss": round(steps[-1]["loss"], 4)}
    return {"steps": len(steps), **losses, "layers": path_of(model)}


def evaluate(run: Run, folder: Path, console: Console) -> Summary:
    """Loss and exact match of the base and of the tuned model on the same held-out rows; answers.jsonl."""
    settings = run.recipe.eval
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
    return comparison.summary


def export(run: Run, folder: Path) -> Summary:
    """What the recipe asks for besides the adapter: merged/ and model-TYPE.gguf."""
    wanted = run.recipe.export
    if wanted.merged or wanted.gguf:
        model, tokenizer = load_tuned(run.recipe, run.folder / "trained")
        fingerprint.keep(fingerprint.check(tokenizer, run.folder / "trained", "the model was trained with"), folder)
    if wanted.merged:
        method = "merged_4bit" if wanted.merged == "nf4" else "merged_16bit"
        save_merged(model, folder / "merged", tokenizer, method=method, base=wanted.base, dtype=MERGED[wanted.merged])
    if wanted.gguf:
        save_gguf(model, folder, tokenizer, wanted.gguf, base=wanted.base)
    return {item.name: f"{_size(item) / 1e6:.1f} MB" for item in sorted(folder.iterdir())}


def _size(item: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(path.stat().st_size for path in [item, *item.rglob("*")] if path.is_file())
