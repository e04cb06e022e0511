"""Generation with a key-value cache: the tokens that running the whole text again for each token gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import harness
from whet import FastLanguageModel

NEW = 12  # tokens; with the prompt, more than the window


def greedy(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """NEW tokens after `prompt` [T], each the likeliest after a full pass without a cache."""
    ids = prompt[None]
    for _ in range(NEW):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return ids[0, len(prompt) :]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_cached_generation_equals_recomputation(checkpoint: Callable[..., Path], family: str, base: str) -> None:
    """Catches a cached step that sees too few or too many keys, and left padding that shifts positions or is read."""
    model = harness.whet_model(checkpoint(family), family, base)
    harness.randomise_adapter(model)
    FastLanguageModel.for_inference(model)
    prompts = [torch.tensor(ids) for ids in ([5, 9, 17], [40, 3, 8, 77, 21, 9, 64, 30, 11], [7])]
    batch = harness.padded(prompts, side="left")
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None}
    with torch.no_grad():
        generated = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pad_token_id=0, **settings
        )
        for prompt, row in zip(prompts, generated, strict=True):
            assert row[-NEW:].tolist() == greedy(model, prompt).tolist()
        one = model.generate(input_ids=prompts[1][None], pad_token_id=0, **settings)
    assert one[0, -NEW:].tolist() == generated[1, -NEW:].tolist()
