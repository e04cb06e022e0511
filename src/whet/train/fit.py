"""Train a model by a recipe: from rows of token ids, or preference pairs, to trained weights, resumable any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainerState
from transformers.modeling_utils import PreTrainedModel

from whet.recipe import Recipe
from whet.runs.store import Run
from whet.train.batches import WatchedDPOTrainer, WatchedSFTTrainer
from whet.train.callbacks import Bar, Metrics, OrderlyStop, Seals
from whet.train.checkpoint import newest_whole
from whet.train.recovery import Recovery, free
from whet.train.restore import load_weights
from whet.train.trainers import DPOConfig, SFTConfig
from whet.train.watch import Diverged, Watch, Watching

WATCHING = Watching()


class Stopped(KeyboardInterrupt):
    """Training was stopped by Ctrl-C and left a checkpoint to go on from."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped after step {step}")


def fit(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    run: Run,
    console: Console,
    *,
    watching: Watching = WATCHING,
    heldout: Callable[[], float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train `model` in place on `rows`, going on from the newest whole checkpoint of the run.

    rows: for sft, columns input_ids, labels and, when packed, seq_lengths; for dpo, prompt, chosen, rejected.
    watching: what becomes of a step that makes no number, and when to stop early. heldout: measures the held-out loss
    at each checkpoint (nats a token), for early stopping, and leaves training as it was. callbacks: more of them.
    Raises Stopped after Ctrl-C, WhetError where going on is of no use.
    """
    recovery = Recovery(run, model, watching)
    while not _train(model, tokenizer, rows, run, console, recovery, heldout, callbacks):
        pass


def _train(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    run: Run,
    console: Console,
    recovery: Recovery,
    heldout: Callable[[], float] | None,
    callbacks: Sequence[TrainerCallback],
) -> bool:
    """Whether training came to its end; False where it was put back to a good state, from which to go on."""
    checkpoints = run.folder / "checkpoints"
    resumed = newest_whole(checkpoints) if checkpoints.is_dir() else None
    run.forget_after(int(resumed.name.rpartition("-")[2]) if resumed else 0)
    stop, bar = OrderlyStop(), Bar(console)
    trainer = trainer_of(run.recipe, model, tokenizer, rows, checkpoints, callbacks=[stop, Seals()])
    trainer.skipped = recovery.skipped
    watch = Watch(run, trainer, recovery.watching, heldout, recovery.rate)
    # the watch first: the numbers of a step that is undone are not kept
    for callback in (watch, Metrics(run), bar, *callbacks):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # the metrics go to the run, the progress to the bar
    if resumed is not None and _was_last(trainer, resumed):
        load_weights(model, watch.best_checkpoint() or resumed)
        return True
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except Diverged as failure:
        recovery.recover(trainer, failure)
        free(trainer)
        return False
    finally:  # the trainer tells its callbacks nothing when it fails
        stop.on_train_end()
        bar.on_train_end()
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(trainer.state.global_step)
    if (best := watch.best_checkpoint()) is not None:
        load_weights(model, best)
    return True


def _was_last(trainer: WatchedSFTTrainer | WatchedDPOTrainer, checkpoint: Path) -> bool:
    """Whether all steps were done at the checkpoint, whose state the trainer then has: it would do one more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer.state = state
    return True


def trainer_of(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    folder: Path,
    callbacks: list[TrainerCallback],
    **changes: Any,
) -> WatchedSFTTrainer | WatchedDPOTrainer:
    """The trainer that the recipe asks for, which writes to `folder`. changes: arguments over the recipe's."""
    dpo = recipe.train.method == "dpo"
    kind, config = (WatchedDPOTrainer, _dpo_config) if dpo else (WatchedSFTTrainer, _sft_config)
    arguments = config(recipe, model, folder, changes)
    return kind(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)


def _sft_config(recipe: Recipe, model: Any, folder: Path, changes: dict[str, Any]) -> SFTConfig:
    # The rows are tokenized, cut and packed already, so the trainer has nothing to prepare.
    return SFTConfig(
        **_common(recipe, model, folder) | changes, max_length=None, packing=False, padding_free=recipe.train.packing
    )


def _dpo_config(recipe: Recipe, model: Any, folder: Path, changes: dict[str, Any]) -> DPOConfig:
    return DPOConfig(
        **_common(recipe, model, folder) | changes, max_length=recipe.model.max_seq_length, beta=recipe.train.beta
    )


def _common(recipe: Recipe, model: Any, folder: Path) -> dict[str, Any]:
    train, cuda = recipe.train, torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.micro_batch,
        "gradient_accumulation_steps": recipe.rows_per_step // train.micro_batch,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup,
        "optim": train.optimizer,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # would log the mean so far in the place of a NaN
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "bf16": cuda and model.dtype != torch.float16,
        "fp16": cuda and model.dtype == torch.float16,
        "dataloader_pin_memory": cuda,
    }
