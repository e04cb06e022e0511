"""Adapters go both ways between whet and plain PEFT, with the same logits to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.parity import harness
from tests.parity.families import FAMILIES
from whet import FastLanguageModel

BASES = ["fp32", "bf16", "nf4", "nf4-bf16"]


def whet_base(folder: Path, family: str, base: str) -> Any:
    """whet's base with plain attention, whose rounding differs from ours: only the adapter is compared here."""
    attention = FAMILIES[family].plain_attention
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), load_in_4bit=base.startswith("nf4"), dtype=harness.COMPUTE[base], attn_implementation=attention
    )
    return model


def logits(model: Any) -> torch.Tensor:
    # In training mode: on some CPUs plain bitsandbytes changes its arithmetic in evaluation. There is no dropout.
    model.train()
    return torch.cat([harness.run(model, batch).logits for batch in harness.batches(3)])


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_of_whet_loads_in_plain_peft(
    checkpoint: Callable[..., Path], family: str, base: str, tmp_path: Path
) -> None:
    """Catches names, ranks or scales in the saved folder that PEFT reads otherwise."""
    folder = checkpoint(family, torch.bfloat16)
    ours = FastLanguageModel.get_peft_model(
        whet_base(folder, family, base), r=4, lora_alpha=8, target_modules=FAMILIES[family].targets, use_rslora=True
    )
    harness.randomise_adapter(ours)
    ours.save_pretrained(tmp_path)
    plain = harness.plain_model(folder, family, base).unload()
    theirs = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_of_plain_peft_loads_on_a_whet_base(
    checkpoint: Callable[..., Path], family: str, base: str, tmp_path: Path
) -> None:
    """Catches a whet base whose modules are not the ones PEFT knows by name and kind."""
    folder = checkpoint(family, torch.bfloat16)
    theirs = harness.plain_model(folder, family, base)
    harness.randomise_adapter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(whet_base(folder, family, base), tmp_path, is_trainable=True)
    assert torch.equal(logits(ours), logits(theirs))


def test_the_saved_adapter_names_its_base(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Catches an adapter that AutoModel can't load by its own folder because its base is not written down."""
    folder = checkpoint("llama")
    ours = harness.whet_model(folder, "llama", "fp32")
    harness.randomise_adapter(ours)
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[5, 9, 17, 33, 40, 41]])}
    with torch.no_grad():
        assert harness.relative(ours(**batch).logits, theirs(**batch).logits) <= 1e-5
