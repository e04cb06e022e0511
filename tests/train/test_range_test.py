"""The learning-rate range test: it finds a rate that trains, and leaves the model as it was."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from tests.road import COLOURS, Here, write_recipe, write_rows
from tests.runs.doctor.planted import plant
from whet.data.prepare import rows
from whet.errors import WhetError
from whet.recipe_model import load_for_training
from whet.train.range_test import judged, plot, range_test


def test_it_suggests_a_rate_and_puts_the_weights_back(tmp_path: Path) -> None:
    """Catches a test that trains the model it is asked about, and a suggestion that is far off."""
    planted = plant(tmp_path)
    model, tokenizer = load_for_training(planted.recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    state = torch.get_rng_state()
    found = range_test(planted.recipe, model, tokenizer, rows(planted.folder / "data", "train"), lowest=1e-5, steps=24)
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert found.suggested is not None
    assert 1e-4 < found.suggested < 1e-2
    assert found.rates[0] == pytest.approx(1e-5)
    assert found.rates == sorted(found.rates)
    found.save(tmp_path / "range.json")
    assert json.loads((tmp_path / "range.json").read_text())["suggested"] == found.suggested
    plot(found, tmp_path / "range.png")
    assert (tmp_path / "range.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_losses_tell() -> None:
    rates = [10.0 ** (i / 2 - 6) for i in range(12)]
    falling = judged(rates, [3.0, 3.0, 2.9, 2.8, 2.6, 2.4, 2.0, 1.5, 1.0, 1.2, 2.5, 9.0])
    assert falling.diverged == rates[-1]
    assert falling.suggested == pytest.approx(rates[9] / 10), "the smoothed loss follows a step behind"
    assert judged(rates, [3.0, 2.99, 3.01, 3.0, 3.0, 3.2] * 2).suggested is None
    assert judged(rates[:1], [math.nan]).suggested is None
    draw = random.Random(0)
    rising = [10.0 ** (i / 15 - 6) for i in range(60)]
    noise = [[draw.gauss(2.0, 0.3) for _ in rising] for _ in range(200)]
    assert sum(judged(rising, losses).suggested is not None for losses in noise) <= 10, "batches differ: none learned"
    learned = [[x - 0.02 * max(0, i - 20) for i, x in enumerate(losses)] for losses in noise]
    assert sum(judged(rising, losses).suggested is not None for losses in learned) >= 190


@pytest.mark.parametrize(("lowest", "highest", "steps"), [(0.0, 1.0, 20), (1e-3, 1e-4, 20), (1e-6, 1.0, 3)])
def test_rates_that_do_not_rise_are_refused(tmp_path: Path, lowest: float, highest: float, steps: int) -> None:
    with pytest.raises(WhetError, match="0 < lowest < highest"):
        range_test(None, None, None, None, lowest=lowest, highest=highest, steps=steps)  # type: ignore[arg-type]


def test_the_command_names_a_rate_to_write_into_the_recipe(tmp_path: Path, here: Here) -> None:
    write_rows(tmp_path / "rows.jsonl", [_row(i, COLOURS[i % 3]) for i in range(40)])
    write_recipe(tmp_path)
    done = here("doctor", "rate", "recipe.yaml", "--out", "found", "--lowest", "1e-5", "--steps", "24", cwd=tmp_path)
    assert done.code == 0, done
    told = json.loads((tmp_path / "found" / "rates.json").read_text())
    assert f"train.learning_rate: {told['suggested']:.1e}" in done.out
    assert (tmp_path / "found" / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("runs/*/run.json")), "a run was begun"


def test_the_command_says_no_where_no_rate_lowers_the_loss(tmp_path: Path, here: Here) -> None:
    write_rows(tmp_path / "rows.jsonl", [_row(i, COLOURS[i % 3]) for i in range(40)])
    write_recipe(tmp_path)
    tiny = ("--lowest", "1e-12", "--highest", "1e-11", "--steps", "10")
    assert here("doctor", "rate", "recipe.yaml", *tiny, cwd=tmp_path).code == 1
    refused = here("doctor", "rate", "recipe.yaml", "--lowest", "1", "--highest", "0.1", cwd=tmp_path)
    assert refused.code == 2
    assert "0 < lowest < highest" in refused.err


def _row(number: int, colour: str) -> dict[str, object]:
    question = {"role": "user", "content": f"Name the colour of {number}."}
    return {"messages": [question, {"role": "assistant", "content": colour}]}
