"""LoRA adapters on a loaded model, through PEFT: what comes out is a plain `peft.PeftModel`.

Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from whet.errors import WhetError


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last names of the model's linear layers but the output head, e.g. ["down_proj", "gate_proj", ...]."""
    head = model.get_output_embeddings()
    kinds = (nn.Linear,)
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, kinds) and module is not head
        }
    )


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    bias: str = "none",
    random_state: int = 3407,
    task_type: str = "CAUSAL_LM",
    **options: Any,
) -> PeftModel:
    """Freeze `model` and put a rank-`r` adapter (fp32, A random from `random_state`, B zero) on `target_modules`.

    `options` are further fields of `peft.LoraConfig` (use_rslora, use_dora, modules_to_save, layers_to_transform, ...).
    """
    _check(model, r, target_modules, lora_alpha, lora_dropout)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=targets,
        bias=bias,
        task_type=task_type,
        **options,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(random_state)
    return get_peft_model(model, config)


def _check(model: PreTrainedModel, r: int, targets: str | Sequence[str], alpha: float, dropout: float) -> None:
    if isinstance(model, PeftModel):
        raise WhetError(
            "the model has an adapter already", where="get_peft_model", fix="train this one, or load the base again"
        )
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise WhetError(f"the rank must be a positive whole number, not {r!r}", where="r", fix="r=16 is a good start")
    if alpha <= 0:
        raise WhetError(f"lora_alpha must be positive, not {alpha!r}", where="lora_alpha", fix=f"lora_alpha={r}")
    if not 0 <= dropout < 1:
        raise WhetError(f"lora_dropout must be in [0, 1), not {dropout!r}", where="lora_dropout", fix="lora_dropout=0")
    if isinstance(targets, str):
        return
    names = {name for name, _ in model.named_modules()}
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing or not targets:
        what = f"the model has no layer named {', '.join(missing)}" if missing else "no layer is named"
        raise WhetError(
            what, where="target_modules", fix=f"use some of {', '.join(linear_names(model))}, or 'all-linear'"
        )
