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
    _check(model, r, lora_alpha, lora_dropout)
    if not isinstance(target_modules, str):
        _check_names(model, target_modules, "target_modules")
    _check_names(model, options.get("modules_to_save") or (), "modules_to_save")
    if target_modules == "all-linear" and options.get("layers_to_transform") is not None:
        target_modules = linear_names(model)  # PEFT picks layers among names only
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(random_state)
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=targets,
            bias=bias,
            task_type=task_type,
            **options,
        )
        return get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise WhetError(
            f"PEFT refuses these settings: {error}", where="get_peft_model", fix="see the fields of peft.LoraConfig"
        ) from error


def _check(model: PreTrainedModel, r: int, alpha: float, dropout: float) -> None:
    if isinstance(model, PeftModel):
        raise WhetError(
            "the model has an adapter already", where="get_peft_model", fix="train this one, or load the base again"
        )
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise WhetError(f"the rank must be a positive whole number, not {r!r}", where="r", fix="r=16 is a good start")
    if not isinstance(alpha, int | float) or alpha <= 0:
        raise WhetError(
            f"lora_alpha must be a positive number, not {alpha!r}", where="lora_alpha", fix=f"lora_alpha={r}"
        )
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise WhetError(f"lora_dropout must be in [0, 1), not {dropout!r}", where="lora_dropout", fix="lora_dropout=0")


def _check_names(model: PreTrainedModel, wanted: Sequence[str], where: str) -> None:
    """Every name of `wanted` must be a module's, or the end of one after a dot."""
    names = {name for name, _ in model.named_modules()}
    missing = [t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in names)]
    fix = f"use some of {', '.join(linear_names(model))}, or 'all-linear'"
    if where == "modules_to_save":
        fix = "name modules such as embed_tokens or lm_head, or leave modules_to_save out"
    if missing:
        raise WhetError(f"the model has no layer named {', '.join(missing)}", where=where, fix=fix)
    if not wanted and where == "target_modules":
        raise WhetError("no layer is named", where=where, fix=fix)
