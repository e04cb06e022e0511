"""Train a model by a recipe: from rows of token ids, or preference pairs, to trained weights, resumable any time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.modeling_utils import PreTrainedModel

from whet.recipe import Recipe
from whet.runs.store import Run
from whet.train.callbacks import Bar, Metrics, OrderlyStop, Seals
from whet.train.checkpoint import newest_whole
from whet.train.trainers import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Stopped(KeyboardInterrupt):
    """Training was stopped by Ctrl-C and left a checkpoint to go on from."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(f"stopped after step {step}")


def fit(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, run: Run, console: Console
) -> None:
    """Train `model` in place on `rows`, going on from the newest whole checkpoint of the run.

    rows: for sft, columns input_ids, labels and, when packed, seq_lengths; for dpo, prompt, chosen, rejected.
    Raises Stopped after Ctrl-C.
    """
    checkpoints = run.folder / "checkpoints"
    resumed = newest_whole(checkpoints) if checkpoints.is_dir() else None
    run.forget_after(int(resumed.name.rpartition("-")[2]) if resumed else 0)
    stop, bar = OrderlyStop(), Bar(console)
    kind, config = (DPOTrainer, _dpo_config) if run.recipe.train.method == "dpo" else (SFTTrainer, _sft_config)
    trainer = kind(
        model=model,
        args=config(run.recipe, model, checkpoints),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[stop, Metrics(run), Seals(), bar],
    )
    trainer.remove_callback(PrinterCallback)  # the metrics go to the run, the progress to the bar
    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    finally:  # the trainer tells its callbacks nothing when it fails
        stop.on_train_end()
        bar.on_train_end()
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(trainer.state.global_step)


def _sft_config(recipe: Recipe, model: Any, folder: Path) -> SFTConfig:
    # The rows are tokenized, cut and packed already, so the trainer has nothing to prepare.
    return SFTConfig(
        **_common(recipe, model, folder), max_length=None, packing=False, padding_free=recipe.train.packing
    )


def _dpo_config(recipe: Recipe, model: Any, folder: Path) -> DPOConfig:
    return DPOConfig(**_common(recipe, model, folder), max_length=recipe.model.max_seq_length, beta=recipe.train.beta)


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
