"""docs/recipe.md lists every key as the code has it, and a recipe finds a model that lies beside it."""

from __future__ import annotations

from pathlib import Path

from whet.recipe import load
from whet.recipe_docs import markdown

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_s_table_is_the_code_s() -> None:
    """Catches a key, default or meaning that changed without its documentation (`whet schema --markdown` prints it)."""
    text = (DOCS / "recipe.md").read_text(encoding="utf-8")
    written = text.partition("<!-- recipe -->\n")[2].partition("\n<!-- /recipe -->")[0]
    assert written == markdown()


def test_a_relative_base_model_starts_at_the_recipe(tmp_path: Path) -> None:
    """Catches a base folder that is looked for where the command was typed."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nmodel: {base: models/mine}\ndata: {sources: [{path: rows.jsonl}]}\n")
    assert load(recipe).model.base == str(tmp_path / "models" / "mine")
