"""What watches a training: it goes back and goes on, or stops, for the right reason, and changes nothing otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.runs.doctor.planted import ROWS, STEPS, Planted, overflow_at, plant
from whet.data.prepare import rows
from whet.errors import WhetError
from whet.recipe_model import load_for_training
from whet.train.batches import rows_of
from whet.train.fit import trainer_of
from whet.train.probe import damaged_weights, first_fault
from whet.train.recovery import Recovery
from whet.train.restore import StartingWeights, load_weights
from whet.train.watch import SKIPPED, Diverged, EarlyStop, Watch, Watching


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    made = plant(tmp_path)
    yield made
    made.run.close()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def spoil_gradients(model: Any, passes: Sequence[int]) -> None:
    """Make the gradient of one weight NaN in some of the backward passes, counted from 1."""
    weight = next(p for name, p in model.named_parameters() if p.requires_grad and "embed" not in name)
    count = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return gradient * math.nan if count in passes else gradient

    weight.register_hook(spoil)


# ---------------------------------------------------------------- nothing is off


def test_a_watched_training_ends_with_the_weights_of_one_that_is_not(planted: Planted, tmp_path: Path) -> None:
    """Catches a probe that draws random numbers, or a held-out measurement that leaves its traces."""
    watched = planted.train(measure=True)
    model, tokenizer = load_for_training(planted.recipe)
    learned = rows(planted.folder / "data", "train")
    trainer_of(planted.recipe, model, tokenizer, learned, tmp_path / "plain", []).train()
    expected = trained(model)
    assert all(torch.equal(value, expected[name]) for name, value in trained(watched).items())
    assert planted.lines("watch") == []
    assert [line["step"] for line in planted.lines("eval")] == [4, 8, 12]


# ---------------------------------------------------------------- going back


def test_a_step_that_fails_once_is_undone_and_the_rate_lowered(planted: Planted) -> None:
    """Catches a back-off whose lower rate the checkpoint's schedule overwrites, and NaN left in weights or moments."""
    model = planted.train(lambda model: spoil_gradients(model, [6]))
    (line,) = planted.lines("watch")
    assert (line["failed"], line["step"], line["action"], line["rate"]) == (6, 4, "lowered the rate", 0.5)
    steps = planted.lines("train")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(step["loss"]) for step in steps)
    falls = (STEPS - 4) / (STEPS - 3)  # the schedule is linear
    assert steps[4]["learning_rate"] == pytest.approx(0.5 * steps[3]["learning_rate"] * falls, rel=0.02)
    assert damaged_weights(model) == []


def test_before_the_first_checkpoint_it_goes_back_to_the_start(planted: Planted) -> None:
    model = planted.train(lambda model: spoil_gradients(model, [2]))
    (line,) = planted.lines("watch")
    assert (line["failed"], line["step"]) == (2, 0)
    assert damaged_weights(model) == []
    assert 0.4e-3 < max(line["learning_rate"] for line in planted.lines("train")) <= 0.5e-3


def test_a_whole_model_is_put_back_from_its_checkpoint(tmp_path: Path) -> None:
    """Catches weights that a checkpoint names otherwise, and that stay broken."""
    changes = {"adapter": None, "train.max_steps": 4, "train.checkpoint_every": 2, "train.learning_rate": 1e-4}
    planted = plant(tmp_path, changes=changes)
    model = planted.train(lambda model: spoil_gradients(model, [3]))
    (line,) = planted.lines("watch")
    assert (line["failed"], line["step"]) == (3, 2)
    assert damaged_weights(model) == []
    assert [math.isfinite(step["loss"]) for step in planted.lines("train")] == [True] * 4


def test_it_goes_back_so_many_times_and_then_stops(planted: Planted) -> None:
    """Catches a training that goes round in circles for ever."""
    with pytest.raises(WhetError, match=r"gradient norm became nan at step 5: .*, after going back once"):
        planted.train(lambda model: spoil_gradients(model, [5, 7]), watching=Watching(backoffs=1))
    assert [line["action"] for line in planted.lines("watch")] == ["lowered the rate", "stopped"]


def test_asked_to_stop_it_stops_and_still_says_why(planted: Planted) -> None:
    with pytest.raises(WhetError, match="gradient norm became nan at step 3") as told:
        planted.train(lambda model: spoil_gradients(model, [3]), watching=Watching(on_nan="stop"))
    assert "learning_rate" in str(told.value.fix)
    assert [line["action"] for line in planted.lines("watch")] == ["stopped"]


def test_a_run_that_is_started_again_keeps_what_was_changed(planted: Planted) -> None:
    """Catches a resumed run that meets the bad batch again, or goes on at the rate that broke it."""
    planted.run.log(stage="watch", step=6, action="skipped", place=[6, 0])
    planted.run.log(stage="watch", step=9, action="lowered the rate", rate=0.25)
    recovery = Recovery(planted.run, torch.nn.Linear(1, 1), Watching())
    assert (recovery.skipped, recovery.rate, recovery.count) == (frozenset({(6, 0)}), 0.25, 2)


# ---------------------------------------------------------------- early stopping


def test_overfitting_stops_early_with_the_best_checkpoint(tmp_path: Path) -> None:
    """Catches the best checkpoint thrown away by newer ones, and a run that ends with its last weights."""
    changes = {"train.max_steps": 60, "train.learning_rate": 5e-3, "train.checkpoint_every": 3}
    planted = plant(tmp_path, ROWS[:16], changes)
    planted.train(measure=True, watching=Watching(early_stop=EarlyStop(patience=2)))
    losses = {line["step"]: line["mean"] for line in planted.lines("eval")}
    best = min(losses, key=lambda step: losses[step])
    (line,) = planted.lines("watch")
    assert (line["action"], line["kept"]) == ("stopped early", best)
    assert planted.lines("train")[-1]["step"] < 60
    kept = load_file(planted.folder / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    ended = load_file(planted.folder / "trained" / "adapter_model.safetensors")
    assert kept.keys() == ended.keys()
    assert all(torch.equal(kept[name], ended[name]) for name in kept)


# ---------------------------------------------------------------- single rules


def watch_of(planted: Planted, **trainer: Any) -> Watch:
    given = {"step_batches": [], "train_dataset": Dataset.from_dict({"input_ids": []}), "accelerator": None} | trainer
    return Watch(planted.run, SimpleNamespace(**given), Watching())


def told(watch: Watch, step: int, loss: float, grad_norm: float, fp16: bool = False) -> None:
    arguments: Any = SimpleNamespace(fp16=fp16)
    state: Any = SimpleNamespace(global_step=step)
    control: Any = SimpleNamespace()
    watch.on_log(arguments, state, control, logs={"loss": loss, "grad_norm": grad_norm})


def test_fp16_may_leave_steps_out_but_not_for_ever(planted: Planted) -> None:
    """Catches a scaler's usual first steps taken for a failure, and one that never takes a step again."""
    watch = watch_of(planted)
    for step in range(1, SKIPPED):
        told(watch, step, 2.0, math.inf, fp16=True)
    told(watch, SKIPPED, 2.0, 1.0, fp16=True)
    for step in range(SKIPPED + 1, 2 * SKIPPED):
        told(watch, step, 2.0, math.inf, fp16=True)
    with pytest.raises(WhetError, match="out of its range"):
        told(watch, 2 * SKIPPED, 2.0, math.inf, fp16=True)
    assert planted.lines("watch")[-1]["cause"] == "fp16 range"


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_a_number_that_is_none_undoes_the_step(planted: Planted, loss: float, grad_norm: float) -> None:
    with pytest.raises(Diverged):
        told(watch_of(planted), 1, loss, grad_norm)


def test_a_single_batch_without_labels_is_told_with_its_rows(planted: Planted) -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 5]]), "labels": torch.full((1, 6), -100)}
    known = Dataset.from_dict({"input_ids": [[1, 2], [5, 6, 7, 8, 9, 5]]})
    watch = watch_of(planted, step_batches=[batch], train_dataset=known)
    told(watch, 1, 0.0, 0.0)
    told(watch, 2, 2.0, 1.0)
    (line,) = planted.lines("watch")
    assert (line["cause"], line["rows"]) == ("nothing to learn from", "row 1 of data/train")


def test_a_model_without_anything_to_train_is_refused(planted: Planted) -> None:
    model: Any = torch.nn.Linear(1, 1).requires_grad_(False)
    nothing: Any = SimpleNamespace(global_step=0)
    watch = watch_of(planted)
    with pytest.raises(WhetError, match="no weight of the model is trained"):
        watch.on_train_begin(nothing, nothing, nothing, model=model)


# ---------------------------------------------------------------- its parts


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=12, unique_by=tuple),
    st.data(),
)
def test_the_rows_of_a_batch_are_found_by_their_tokens(documents: list[list[int]], data: st.DataObject) -> None:
    """Catches rows told by the wrong number: what they hold must be the batch."""
    chosen = data.draw(st.lists(st.sampled_from(range(len(documents))), min_size=1, max_size=4))
    line = [token for number in chosen for token in documents[number]]
    found = rows_of({"input_ids": torch.tensor([line])}, Dataset.from_dict({"input_ids": documents}))
    walked = [token for number in found for token in documents[number]]
    assert walked == line[: len(walked)]
    if len({tuple(d[:1]) for d in documents}) == len(documents) and all(len(d) >= 4 for d in documents):
        assert found == chosen


def test_probing_leaves_training_as_it_was(planted: Planted, tmp_path: Path) -> None:
    """Catches a probe after which the same step has other gradients, dropout or modes."""
    model, tokenizer = load_for_training(planted.recipe)
    learned = rows(planted.folder / "data", "train")
    trainer = trainer_of(planted.recipe, model, tokenizer, learned, tmp_path / "out", [])
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    weight = next(p for p in model.parameters() if p.requires_grad)
    weight.grad = torch.ones_like(weight)
    state, values = torch.get_rng_state(), trained(model)
    assert first_fault(trainer, batch) is None
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())
    assert all(torch.equal(value, values[name]) for name, value in trained(model).items())
    overflow_at(model, int(batch["input_ids"][0, 0]), "layers.1.mlp.up_proj")
    fault = first_fault(trainer, batch)
    assert fault is not None
    assert fault.layer == "model.layers.1.mlp.up_proj"


def test_weights_are_put_back_to_the_bit(planted: Planted, tmp_path: Path) -> None:
    model, _ = load_for_training(planted.recipe)
    before = trained(model)
    start = StartingWeights(model)
    model.save_pretrained(tmp_path / "saved")
    for put_back in (lambda: start.put_back(model), lambda: load_weights(model, tmp_path / "saved")):
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(1.0)
        put_back()
        assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_a_checkpoint_without_weights_is_refused(planted: Planted, tmp_path: Path) -> None:
    model, _ = load_for_training(planted.recipe)
    with pytest.raises(WhetError, match="holds no weights"):
        load_weights(model, tmp_path)
