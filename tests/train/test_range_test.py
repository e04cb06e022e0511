"""The learning-rate range test: it finds a rate that trains, and leaves the model as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

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
    rates = [10.0 ** (i - 6) for i in range(6)]
    falling = judged(rates, [3.0, 2.9, 2.0, 1.0, 1.5, 9.0])
    assert falling.diverged == rates[-1]
    assert falling.suggested == pytest.approx(rates[4] / 10), "the smoothed loss follows a step behind"
    assert judged(rates, [3.0, 2.99, 3.01, 3.0, 3.0, 3.2]).suggested is None
    assert judged(rates[:1], [math.nan]).suggested is None


@pytest.mark.parametrize(("lowest", "highest", "steps"), [(0.0, 1.0, 20), (1e-3, 1e-4, 20), (1e-6, 1.0, 3)])
def test_rates_that_do_not_rise_are_refused(tmp_path: Path, lowest: float, highest: float, steps: int) -> None:
    with pytest.raises(WhetError, match="0 < lowest < highest"):
        range_test(None, None, None, None, lowest=lowest, highest=highest, steps=steps)  # type: ignore[arg-type]
