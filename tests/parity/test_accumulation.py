"""Gradient accumulation through a real trainer: four rows at once and one by one are the same step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.parity import harness
from tests.parity.families import WORDS
from whet import FastLanguageModel

LENGTHS = (24, 5, 15, 9)  # tokens; a mean of the rows' means is far from the mean over tokens


def first_step(folder: Path, out: Path, base: str, batch: int, **options: object) -> tuple[float, float]:
    """Loss and gradient norm of one optimizer step over four rows, `batch` rows at a time."""
    model = harness.whet_model(folder, "llama", base)
    harness.randomise_adapter(model)
    _, tokenizer = FastLanguageModel.from_pretrained(str(folder))
    rows = [{"input_ids": [3 + (7 * i * i + n) % (WORDS - 3) for i in range(n)]} for n in LENGTHS]
    args = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
        max_steps=1,
        logging_steps=1,
        max_length=64,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    trainer = SFTTrainer(model=model, processing_class=tokenizer, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], log["grad_norm"]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_one_by_one_equals_all_at_once(checkpoint: Callable[..., Path], tmp_path: Path, base: str) -> None:
    """Catches a loss averaged per micro-batch instead of over the step's label tokens."""
    folder = checkpoint("llama")
    loss, norm = first_step(folder, tmp_path, base, batch=4)
    for size in (2, 1):
        part_loss, part_norm = first_step(folder, tmp_path, base, batch=size)
        assert part_norm == pytest.approx(norm, rel=1e-5)
        assert part_loss == pytest.approx(loss, rel=1e-5)


def test_packed_in_one_row_equals_padded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Catches documents that see each other, or lose a label at a boundary, in rows that TRL's own collator packs."""
    folder = checkpoint("llama")
    loss, norm = first_step(folder, tmp_path, "fp32", batch=4)
    packed_loss, packed_norm = first_step(folder, tmp_path, "fp32", batch=4, packing=True)
    assert packed_norm == pytest.approx(norm, rel=1e-5)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
