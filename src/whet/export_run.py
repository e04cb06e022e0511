"""What `whet export` is given, as a model in memory with its prompts and its origin: a run, a model, an adapter."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from whet.data import fingerprint
from whet.data.examples import Conversation, Preference, Text
from whet.data.formats import Source, load_examples
from whet.data.prepare import questions, rows
from whet.data.template import prompt_text, render
from whet.errors import WhetError
from whet.eval_models import ADAPTER, model_in, recipe_of
from whet.export.artifacts import CHUNK, CHUNKS, Calibration, Progress
from whet.export.bundle import Prompts, export_bundle, write_bundle
from whet.export.imatrix import Imatrix, read_imatrix
from whet.export.licence import licence_of
from whet.export.model_card import Artifact, Origin, Section
from whet.export.proof.prompts import general_prompts
from whet.export.wanted import TRAINING, Wanted
from whet.recipe import Export, Recipe
from whet.recipe_model import load_tuned
from whet.runs.report.page import scores
from whet.runs.report.record import Record, part, read_run

MATRICES = (".imatrix", ".gguf", ".dat")
"""Suffixes of files that hold an importance matrix; others hold rows or text to measure one on."""

FAILED = "export-not-proven"
"""Folder of a run that holds the report of an export that failed its proof."""


def export_run(
    run: Path, out: Path, wanted: Wanted, *, prompts: Path | None = None, progress: Progress = lambda step: None
) -> list[Artifact]:
    """Export what a finished run has trained into the folder `out`, compared on the run's own held-out prompts.

    prompts: a file of others. Raises WhetError where the run has trained nothing, the tokenizer is not the one that it
    was trained with, or an artifact does not say what the model says.
    """
    model, tokenizer = _tuned(run, recipe_of(run), wanted)
    asked = prompts_in(prompts, tokenizer) if prompts else prompts_of_run(run, tokenizer)
    importance = importance_for(wanted, tokenizer, run)
    return export_bundle(
        model, tokenizer, out, wanted, origin_of_run(run), asked, importance=importance, progress=progress
    )


def export_stage(
    run: Path, folder: Path, recipe: Recipe, wanted: Wanted, *, progress: Progress = lambda step: None
) -> list[Artifact]:
    """`export_run` for a stage of a run: writes into `folder`, to which the caller gives checksums and its name.

    The report of an export that fails its proof is left in the run's folder.
    """
    shutil.rmtree(run / FAILED, ignore_errors=True)
    model, tokenizer = _tuned(run, recipe, wanted)
    return write_bundle(
        model,
        tokenizer,
        folder,
        wanted,
        origin_of_run(run),
        prompts_of_run(run, tokenizer),
        report=run / FAILED,
        importance=importance_for(wanted, tokenizer, run),
        progress=progress,
    )


def wanted_of(export: Export) -> Wanted | None:
    """What a recipe asks for; None where it is nothing."""
    if not export.anything:
        return None
    return Wanted(
        export.merged, tuple(export.gguf), export.base, export.proof, export.imatrix, gguf_adapter=export.gguf_adapter
    )


def export_model(
    name: str,
    out: Path,
    wanted: Wanted,
    *,
    called: str | None = None,
    prompts: Path | None = None,
    held: str = "16bit",
    progress: Progress = lambda step: None,
) -> list[Artifact]:
    """Export a model folder, hub name or `builtin:NAME`, or the folder of an adapter, which names its base.

    called: the model's name in its card; the folder's otherwise. prompts: a file of held-out ones. held: how the
    weights are held while they are merged: 16bit, 32bit, int8, nf4.
    """
    loaded = model_in(name, held=held)
    base = str(loaded.model.config._name_or_path or name)
    is_adapter = (Path(name).expanduser() / ADAPTER).is_file()
    origin = Origin(
        name=called or _last(name),
        base=_last(_base_name(Path(name)) if is_adapter else name),
        licence=licence_of(_base_name(Path(name)) if is_adapter else name if name.startswith("builtin:") else base),
    )
    asked = prompts_in(prompts, loaded.tokenizer) if prompts else _general(loaded.tokenizer)
    importance = importance_for(wanted, loaded.tokenizer)
    return export_bundle(
        loaded.model, loaded.tokenizer, out, wanted, origin, asked, importance=importance, progress=progress
    )


# ---------------------------------------------------------------- prompts


def prompts_of_run(run: Path, tokenizer: Any) -> Prompts:
    """The questions of the run's held-out rows; general ones where its rows are texts."""
    found = [question.prompt for question in questions(run / "data")]
    return Prompts(found, "held-out prompts of the run") if found else _general(tokenizer)


def prompts_in(path: Path, tokenizer: Any) -> Prompts:
    """The prompts of a file of rows, in any form that training data may have. Raises WhetError."""
    texts = []
    for example in load_examples([Source(path.name)], base=path.parent):
        if isinstance(example, Conversation):
            texts.append(prompt_text(tokenizer, example.messages, tools=example.tools))
        elif isinstance(example, Preference):
            texts.append(render(tokenizer, example.prompt, add_generation_prompt=True))
        elif isinstance(example, Text):
            texts.append(example.text)
    if not texts:
        raise WhetError("there is no prompt in it", where=str(path), fix='rows such as {"messages": [...]}')
    return Prompts(texts, f"prompts of {path.name}")


# ---------------------------------------------------------------- calibration


def importance_for(wanted: Wanted, tokenizer: Any, run: Path | None = None) -> Imatrix | Calibration | None:
    """What the rounding of GGUF files is to go by: a matrix that was read, or text to measure one on."""
    if wanted.imatrix is None:
        return None
    if wanted.imatrix != TRAINING:
        path = Path(wanted.imatrix).expanduser()
        if path.suffix in MATRICES:
            return read_imatrix(path)
        return Calibration(texts_in(path, tokenizer), path.name)
    if run is None:
        raise WhetError(
            "a model's folder does not know the rows it was trained on",
            where=f"imatrix {TRAINING}",
            fix="name a file of text like what it will be asked, or export the run",
        )
    return Calibration(training_texts(run, tokenizer), "training rows of the run")


def training_texts(run: Path, tokenizer: Any) -> list[str]:
    """Rows that the run was trained on, as the model saw them, spread evenly: as many as a measurement reads."""
    trained = rows(run / "data", "train")
    found = len(trained)
    if "input_ids" not in trained.column_names:  # preference pairs
        pairs = (trained[i] for i in range(min(found, CHUNK * CHUNKS // 64)))
        return [render(tokenizer, [*pair["prompt"], *pair["chosen"]]) for pair in pairs]
    lengths = [len(trained[i]["input_ids"]) for i in range(min(found, 64))]
    needed = min(found, math.ceil(CHUNK * CHUNKS * len(lengths) / sum(lengths)))
    return [tokenizer.decode(trained[i * found // needed]["input_ids"]) for i in range(needed)]


def texts_in(path: Path, tokenizer: Any) -> list[str]:
    """The rows of a file as the model would see them in training. Raises WhetError."""
    texts = []
    for example in load_examples([Source(path.name)], base=path.parent):
        if isinstance(example, Conversation):
            texts.append(render(tokenizer, example.messages, tools=example.tools))
        elif isinstance(example, Preference):
            texts.append(render(tokenizer, [*example.prompt, *example.chosen]))
        elif isinstance(example, Text):
            texts.append(example.text)
    return texts


def _general(tokenizer: Any) -> Prompts:
    return Prompts(general_prompts(tokenizer), "general prompts of whet's own")


# ---------------------------------------------------------------- where a model comes from


def origin_of_run(folder: Path) -> Origin:
    """What the card says of a run: digests, settings, scores; nothing of the data itself."""
    record = read_run(folder)
    base = str(part(record.recipe, "model").get("base") or "")
    sections = [_data(record), _training(record), _evaluation(record), _made(record)]
    return Origin(record.name, _last(base), licence_of(base), tuple(one for one in sections if one.rows))


def _data(record: Record) -> Section:
    sides = part(record.data, "sides")
    rows = {
        "data's version": record.data.get("digest"),
        "rows to train on": part(sides, "train").get("rows"),
        "rows held out": part(sides, "eval").get("rows"),
        "tokens": part(record.stages, "data").get("tokens"),
    }
    return Section("Data", _rows(rows))


def _training(record: Record) -> Section:
    train, adapter, model = (part(record.recipe, name) for name in ("train", "adapter", "model"))
    lora = f"LoRA, r {adapter.get('r')}, alpha {adapter.get('alpha')}" if adapter else "every weight"
    summary = part(record.stages, "trained")
    rows = {
        "method": train.get("method"),
        "trained": lora,
        "base held as": model.get("load"),
        "epochs": train.get("epochs"),
        "steps": summary.get("steps"),
        "learning rate": train.get("learning_rate"),
        "schedule": train.get("schedule"),
        "tokens a step": train.get("tokens_per_step"),
        "longest row": model.get("max_seq_length"),
        "seed": record.facts.get("seed"),
        "first loss": summary.get("first loss"),
        "last loss": summary.get("last loss"),
    }
    return Section("Training", _rows(rows))


def _evaluation(record: Record) -> Section:
    """Base against tuned, and the gate's decision."""
    found: dict[str, dict[str, str]] = {}
    for score in scores(record):
        interval = "" if score.low is None or score.high is None else f" ({score.low:.3g} to {score.high:.3g})"
        found.setdefault(score.task, {})[score.model] = f"{score.mean:.4g}{interval}"
    rows = {task: ", ".join(f"{model} {value}" for model, value in models.items()) for task, models in found.items()}
    if record.decision is not None:
        rows["gate"] = "ship" if record.decision.get("ship") is True else "do not ship"
    return Section("Evaluation", _rows(rows))


def _made(record: Record) -> Section:
    versions, git = part(record.facts, "versions"), part(record.facts, "git")
    rows = {
        "run": record.id,
        "recipe": _digest(record),
        "started": record.facts.get("started"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": git.get("commit"),
    }
    return Section("Run", _rows(rows))


def _digest(record: Record) -> str | None:
    """SHA-256 of the run's recipe.yaml, as its receipt has it."""
    found = record.receipts.get("run", {}).get("recipe.yaml")
    return str(found) if found else None


def _rows(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items() if value not in (None, "", {}, []))


def _last(name: str) -> str:
    """A model's name for readers: a hub name or `builtin:NAME` as it is, a folder by its last name alone."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() or path.is_absolute() else name


# ---------------------------------------------------------------- models


def _tuned(run: Path, recipe: Recipe, wanted: Wanted) -> tuple[Any, Any]:
    """The run's model as it is to be exported: its adapter on the base that training saw, or on the original."""
    wanted.check()
    if not (run / "trained").is_dir():
        raise WhetError("the run has trained nothing yet", where=str(run), fix="let it finish: whet run RECIPE")
    if wanted.base == "original" and recipe.model.load in ("nf4", "int8"):
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load": "16bit"})})
    model, tokenizer = load_tuned(recipe, run / "trained")
    fingerprint.check(tokenizer, run / "trained", "the model was trained with")
    return model, tokenizer


def _base_name(adapter: Path) -> str:
    values = json.loads((adapter.expanduser() / ADAPTER).read_text(encoding="utf-8"))
    return str(values["base_model_name_or_path"])
