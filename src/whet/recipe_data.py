"""The data of a recipe: its sources read, split, tokenized and packed as its model and method ask."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from whet import recipe as recipes
from whet.data.formats import Source
from whet.data.prepare import Prepared, prepare, read_sides


def prepare_data(recipe: recipes.Recipe, tokenizer: PreTrainedTokenizerBase, base: Path) -> Prepared:
    """Training rows, held-out rows and questions; paths start at `base`. Raises WhetError for what the data lacks."""
    split = recipe.data.split or recipes.Split()
    train, heldout = read_sides(
        _sources(recipe.data.sources),
        _sources(recipe.data.eval_sources),
        base=base,
        eval_fraction=split.eval,
        group_by=split.group_by,
        seed=recipe.seed,
    )
    return prepare(
        train,
        heldout,
        tokenizer,
        method=recipe.train.method,
        max_length=recipe.model.max_seq_length,
        train_on=recipe.data.train_on,
        packing=recipe.train.packing,
    )


def _sources(sources: list[recipes.Source]) -> list[Source]:
    return [Source(s.path, None if s.format == "auto" else s.format, s.columns) for s in sources]
