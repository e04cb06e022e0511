"""The short training before the long one: it passes what is sound, and stops what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs.doctor.planted import QUIET, ROWS, Planted, freeze, plant
from whet.data.prepare import rows
from whet.errors import WhetError
from whet.recipe_model import load_for_training
from whet.train.smoke import part_of, smoke


def smoked(planted: Planted, folder: Path, frozen: bool = False) -> dict[str, object]:
    model, tokenizer = load_for_training(planted.recipe)
    if frozen:
        freeze(model)
    folder.mkdir()
    return smoke(planted.recipe, model, tokenizer, rows(planted.folder / "data", "train"), folder, QUIET)


def test_a_sound_recipe_passes_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Catches a smoke run that leaves weights which the real run would go on from."""
    planted = plant(tmp_path)
    summary = smoked(planted, tmp_path / "smoke")
    assert summary["steps"] == 8
    assert sorted(path.name for path in (tmp_path / "smoke").iterdir()) == ["metrics.jsonl"]
    assert planted.lines("train") == []


@pytest.mark.parametrize(
    ("changes", "frozen", "why"),
    [({"train.learning_rate": 0.5}, False, "learning rate too high"), ({}, True, "frozen adapter")],
)
def test_what_is_far_off_stops(tmp_path: Path, changes: dict[str, float], frozen: bool, why: str) -> None:
    planted = plant(tmp_path, changes=changes)
    with pytest.raises(WhetError, match=f"the smoke run failed, {why}"):
        smoked(planted, tmp_path / "smoke", frozen)


def test_a_tenth_of_the_rows_but_enough_to_see_a_trend(tmp_path: Path) -> None:
    planted = plant(tmp_path, ROWS)
    held = rows(planted.folder / "data", "train")
    assert len(part_of(held, planted.recipe, 0.1)) == min(len(held), 16)
    assert len(part_of(held, planted.recipe, 1.0)) == len(held)
    assert part_of(held, planted.recipe, 0.1)[0] == part_of(held, planted.recipe, 0.1)[0]
