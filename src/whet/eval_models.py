"""The models that `whet eval` is told to ask: a folder, a run, a served one; and what they are compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import WhetError
from whet.evals.models import InMemory, Model
from whet.evals.results import TaskResult
from whet.evals.run_tasks import load_results

if TYPE_CHECKING:
    from whet.recipe import Recipe

ADAPTER = "adapter_config.json"
BASE = "base"


def model_in(name: str, *, held: str = "16bit", batch: int = 16) -> InMemory:
    """A model folder, hub name or `builtin:NAME`, or the folder of an adapter, which names its base.

    held: how its weights are held: 16bit, 32bit, int8, nf4.
    """
    from whet.models.load import load

    folder = Path(name).expanduser()
    if not (folder / ADAPTER).is_file():
        model, tokenizer = load(name, precision=held)
        return InMemory(model, tokenizer, name, batch)
    from peft import PeftModel

    base, tokenizer = load(_base_of(folder / ADAPTER), precision=held)
    return InMemory(PeftModel.from_pretrained(base, str(folder)), tokenizer, name, batch)


def model_of_run(name: str, runs: Path, *, batch: int = 16) -> InMemory:
    """What a run has trained, held as its recipe says. Raises WhetError where the run has not come so far."""
    from whet.recipe_model import load_tuned
    from whet.runs.folders import find

    folder = find(runs, name)
    if not (folder / "trained").is_dir():
        fix = "let it finish: whet run RECIPE"
        raise WhetError("the run has trained nothing yet", where=str(folder), fix=fix)
    model, tokenizer = load_tuned(recipe_of(folder), folder / "trained")
    return InMemory(model, tokenizer, folder.name, batch)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a run keeps. Raises WhetError where this whet cannot read it."""
    from pydantic import ValidationError

    from whet.recipe import Recipe
    from whet.runs.folders import recipe_values

    try:
        return Recipe.model_validate(recipe_values(folder))
    except ValidationError as error:
        fix = "use the whet that made the run"
        raise WhetError(f"its recipe can't be read: {error}", where=str(folder / "recipe.yaml"), fix=fix) from error


def model_at(url: str, model: str | None, key_env: str | None, concurrency: int) -> Model:
    """A model behind an OpenAI-compatible server."""
    from pydantic import ValidationError

    from whet.evals.endpoint import Endpoint, EndpointSettings

    if model is None:
        raise WhetError("which of the server's models?", where="--endpoint", fix="--endpoint-model NAME")
    try:
        settings = EndpointSettings(url=url, model=model, key_env=key_env, concurrency=concurrency)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}"
        raise WhetError(what, where="--endpoint", fix="--endpoint http://localhost:8000/v1") from None
    return Endpoint(settings)


def kept_results(other: str) -> dict[str, TaskResult] | None:
    """The results in a folder; None where `other` names a model or a run. Raises WhetError where they are damaged."""
    folder = Path(other)
    is_results = folder.is_dir() and any(folder.glob("*.jsonl")) and not (folder / "run.json").exists()
    return load_results(folder) if is_results else None


def other_model(other: str, asked: Model, runs: Path, *, held: str) -> Model:
    """The model to compare with: a run's, that of a folder, or `base`: the asked one without its adapter."""
    batch = asked.batch if isinstance(asked, InMemory) else 16
    if other == BASE:
        if not isinstance(asked, InMemory):
            fix = "name the base itself: --compare FOLDER"
            raise WhetError("a served model has no base in memory", where="--compare", fix=fix)
        return InMemory(asked.model, asked.tokenizer, BASE, batch, adapter=False)
    if (Path(other) / "run.json").is_file() or (runs / other).is_dir():
        return model_of_run(other, runs, batch=batch)
    return model_in(other, held=held, batch=batch)


def _base_of(config: Path) -> str:
    try:
        values: Any = json.loads(config.read_text(encoding="utf-8"))
        base = values["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WhetError(
            f"it does not name its base: {error}", where=str(config), fix="save the adapter again"
        ) from None
    if not isinstance(base, str) or not base:
        raise WhetError("it does not name its base", where=str(config), fix="fill in base_model_name_or_path")
    return base
