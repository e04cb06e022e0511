"""The data of a recipe: a version of its data set, and that version tokenized and packed as model and method ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet import recipe as recipes
from whet.data.clean import Clean
from whet.data.formats import Source
from whet.data.prep import steps
from whet.data.prep.engine import engine
from whet.data.prep.prep import Progress, prep
from whet.data.prep.versions import Version
from whet.data.read.rows import Origin
from whet.files import sha256
from whet.runs.ledger import NAME as LEDGER
from whet.runs.ledger import Ledger
from whet.runs.signing import key_in_use

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

FOLDER = "data"
"""Under the runs: the versions of all data sets, by the recipe's name."""


def version_of(
    recipe: recipes.Recipe, base: Path, runs: Path, console: Console, *, workers: int | None = None
) -> Version:
    """The version of the recipe's data, made unless it is there; paths start at `base`. Raises WhetError.

    The ledger under `runs` is told when a version is made: `prep`, of no run.
    """

    @contextmanager
    def witness(made_of: str) -> Iterator[list[Version]]:
        made: list[Version] = []
        inputs, facts = {"sources and steps": made_of}, {"data": recipe.name}
        with Ledger(runs / LEDGER, key_in_use()).stage("prep", run="", inputs=inputs, facts=facts) as stage:
            yield made
            for version in made:
                manifest = version.folder / "manifest.json"
                stage.outputs[f"{FOLDER}/{recipe.name}/{version.folder.name}/{manifest.name}"] = sha256(manifest)

    with _progress(console) as progress:
        work = engine(recipe.data.engine, workers)
        asked = steps_of(recipe, base)
        return prep(recipe.name, asked, base, runs / FOLDER, engine=work, progress=progress, witness=witness)


def prepare_data(
    recipe: recipes.Recipe, tokenizer: PreTrainedTokenizerBase, version: Version, folder: Path, console: Console
) -> dict[str, Any]:
    """Write training rows, held-out rows and questions to `folder`; counts to show. Raises WhetError."""
    from whet.data.prepare import prepare

    with _progress(console) as progress:
        return prepare(
            version,
            tokenizer,
            folder.absolute(),
            method=recipe.train.method,
            max_length=recipe.model.max_seq_length,
            train_on=recipe.data.train_on,
            packing=recipe.train.packing,
            engine=engine(recipe.data.engine),
            progress=progress,
        )


def steps_of(recipe: recipes.Recipe, base: Path) -> steps.Steps:
    """What the recipe asks for, with policy and key read."""
    data = recipe.data
    split = data.split or recipes.Split()
    return steps.Steps(
        sources=_sources(data.sources),
        eval_sources=_sources(data.eval_sources),
        bad_rows=data.bad_rows,
        clean=Clean(**data.clean.model_dump()) if data.clean else None,
        redact=_redaction(data.redact, base) if data.redact else None,
        dedup=steps.Dedup(data.dedup.exact, data.dedup.near) if data.dedup else None,
        split=steps.Split(split.eval, split.group_by, split.stratify_by, split.time, split.at),
        leaks=_leaks(data.leaks, recipe.eval.tasks if recipe.eval else []) if data.leaks else None,
        seed=recipe.seed,
    )


def _leaks(leaks: recipes.Leaks, evaluated: list[str]) -> steps.Leaks:
    """What the recipe is evaluated on counts as a task that must not leak, named among `leaks.tasks` or not."""
    return steps.Leaks(leaks.gate, tuple(dict.fromkeys([*leaks.tasks, *evaluated])))


def _redaction(redact: recipes.Redact, base: Path) -> steps.Redaction:
    from whet.data.redact.keys import load_key
    from whet.data.redact.policy import load_policy, with_classes

    policy = with_classes(load_policy(redact.policy, base), redact.classes)
    key = load_key(redact.key if redact.key.startswith("env:") else base / redact.key) if redact.key else None
    ner = str((base / redact.ner).resolve()) if redact.ner else None
    return steps.Redaction(policy.name, policy.classes, key, ner, redact.vault, policy.regions)


def _sources(sources: list[recipes.Source]) -> tuple[Source, ...]:
    return tuple(_source(source) for source in sources)


def _source(source: recipes.Source) -> Source:
    names = ("path", "sql", "url", "hub", "split", "skip_unreadable")
    origin = Origin(**{name: getattr(source, name) for name in names})
    return Source(origin, None if source.format == "auto" else source.format, source.columns)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar for each step that has several parts, which is gone when all are done."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def progress(step: str, done: int, parts: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=parts)
            bars.update(tasks[step], completed=done, total=parts)

        yield progress
