"""A learning rate for a recipe: its data is made, its model loaded, and the range test run on both."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape

from whet.data.prepare import rows
from whet.errors import WhetError
from whet.models.compute import check_compute
from whet.recipe import Recipe
from whet.recipe_data import prepare_data, version_of
from whet.recipe_model import load_for_training
from whet.train.range_test import HIGHEST, LOWEST, STEPS, RangeTest, check_range, plot, range_test

JSON, PLOT = "rates.json", "rates.png"


def find_rate(
    recipe: Recipe,
    base: Path,
    root: Path,
    out: Path,
    console: Console,
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
) -> RangeTest:
    """The range test of `recipe`, whose paths start at `base`; rates.json and rates.png in the folder `out`.

    root: folder of the runs, which keeps the version of the data that is made. No run is begun. Raises WhetError.
    """
    check_range(lowest, highest, steps)
    check_compute(recipe.model.compute)
    version = version_of(recipe, base, root, console)
    model, tokenizer = load_for_training(recipe)
    with TemporaryDirectory() as folder:
        prepare_data(recipe, tokenizer, version, Path(folder), console)
        found = range_test(
            recipe, model, tokenizer, rows(Path(folder), "train"), lowest=lowest, highest=highest, steps=steps
        )
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / JSON)
    try:
        plot(found, out / PLOT)
    except WhetError as error:  # the numbers are worth more than their picture
        console.print(f"[yellow]no {PLOT}:[/] {escape(error.what)}; {escape(error.fix or '')}")
    return found
