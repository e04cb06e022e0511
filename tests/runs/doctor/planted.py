"""Runs in which something is wrong on purpose, made as `whet run` makes them, on the built-in model.

A run's data goes the real way (read, split, tokenize), in this process; its training is `fit`, as in the pipeline.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

from tests.road import COLOURS, write_recipe, write_rows
from whet.data import fingerprint
from whet.data.prep.engine import engine
from whet.data.prepare import prepare, rows
from whet.evals.heldout import mean_loss
from whet.recipe import Recipe, load
from whet.recipe_data import version_of
from whet.recipe_model import load_for_training, tokenizer_of
from whet.runs.store import Run
from whet.train.fit import fit
from whet.train.watch import Watching

QUIET = Console(quiet=True)
STEPS = 12

Row = dict[str, Any]


def row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [row(f"Which colour has number {i}?", COLOURS[i % 3]) for i in range(40)]


@dataclass
class Planted:
    """A run, its recipe and what it is made from."""

    recipe: Recipe
    base: Path
    run: Run

    @property
    def folder(self) -> Path:
        return self.run.folder

    def train(
        self,
        spoil: Callable[[Any], None] = lambda model: None,
        change: Callable[[Dataset], Dataset] = lambda rows: rows,
        watching: Watching | None = None,
        measure: bool = False,
    ) -> Any:
        """Train as the pipeline does; the model. spoil: damages the model before. change: damages the rows."""
        model, tokenizer = load_for_training(self.recipe)
        spoil(model)
        held = rows(self.folder / "data", "heldout")
        heldout = (lambda: mean_loss(model, held)) if measure else None
        learned = change(rows(self.folder / "data", "train"))
        fit(model, tokenizer, learned, self.run, QUIET, watching=watching or Watching(), heldout=heldout)

        def save(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            fingerprint.keep(fingerprint.fingerprint(tokenizer), folder)
            (folder / "summary.json").write_text("{}")

        self.run.stage("trained", save)
        return model

    def lines(self, stage: str) -> list[dict[str, Any]]:
        return self.run.metrics(stage)


def plant(
    base: Path, examples: Sequence[Row] = ROWS, changes: Mapping[str, Any] | None = None, broken_lines: int = 0
) -> Planted:
    """A run whose data is made and that has not trained. broken_lines: so many at the file's end are cut short."""
    base.mkdir(parents=True, exist_ok=True)
    path = write_rows(base / "rows.jsonl", list(examples))
    with path.open("a") as file:
        file.writelines(json.dumps(row(f"And number {i}?", "red"))[:40] + "\n" for i in range(broken_lines))
    steps = {"train.max_steps": STEPS, "train.checkpoint_every": 4, "adapter.dropout": 0.0}
    recipe = load(write_recipe(base, steps | dict(changes or {})))
    version = version_of(recipe, base, base / "runs", QUIET, workers=1)
    run = Run.open(recipe, base, base / "runs", version.digest)

    def make(folder: Path) -> None:
        tokenizer = tokenizer_of(recipe.model)
        summary = prepare(
            version,
            tokenizer,
            folder,
            method=recipe.train.method,
            max_length=recipe.model.max_seq_length,
            train_on=recipe.data.train_on,
            packing=recipe.train.packing,
            engine=engine("local", 1),
            progress=lambda *_: None,
        )
        fingerprint.keep(fingerprint.fingerprint(tokenizer), folder)
        shutil.copyfile(version.folder / "manifest.json", folder / "manifest.json")
        (folder / "summary.json").write_text(json.dumps(summary))

    run.stage("data", make)
    return Planted(recipe, base, run)


def overflow_at(model: Any, token: int, layer: str) -> None:
    """Make the output of a linear layer infinite where `token` stands, as a sum too large for its type is."""
    modules = dict(model.named_modules())
    (embedding,) = [m for name, m in modules.items() if name.endswith("embed_tokens")]
    (linear,) = [m for name, m in modules.items() if name.endswith(layer)]
    seen: dict[str, Any] = {}
    embedding.register_forward_hook(lambda module, inputs, output: seen.update(mask=(inputs[0] == token)[..., None]))
    linear.register_forward_hook(lambda module, inputs, output: output.masked_fill(seen["mask"], math.inf))


def freeze(model: Any) -> None:
    """B is 0 at the start; with A 0 too, neither has a gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()


def damage(model: Any) -> str:
    """A NaN in a weight of the base; its name."""
    name = "model.layers.3.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_base_model().get_submodule("model.layers.3.self_attn.q_proj").base_layer.weight[0, 0] = math.nan
    return name


def without_labels(rows: Dataset) -> Dataset:
    return rows.map(lambda row: {"labels": [-100] * len(row["labels"])})


def rewritten(folder: Path, copy: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    """A copy of a run's folder with other metrics."""
    shutil.copytree(folder, copy)
    path = copy / "metrics.jsonl"
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return copy
