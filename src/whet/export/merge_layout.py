"""What of a model's structure an export must know, read from its config: a model on the meta device has no data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from whet.errors import WhetError


@dataclass(frozen=True)
class Layout:
    """shapes: of every weight of the model, by name, tied ones too. tied: a weight -> the one whose values it shares.

    linear: modules that a quantization takes, by name. kept: linear modules that it leaves, the output head first of
    all. embedding, head: the names of their weights, None where there is none.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    linear: dict[str, tuple[int, int]]
    kept: tuple[str, ...]
    embedding: str | None
    head: str | None


def layout_of(config: PretrainedConfig) -> Layout:
    """The layout of the model that `config` describes."""
    with torch.device("meta"):
        model = _model_class(config)(config)
    return read_layout(model)


def read_layout(model: Any) -> Layout:
    """The layout of a transformers model, quantized or not, without adapters."""
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise WhetError(
            "its linear layers are of GPT-2's transposed kind, which is not exported",
            where=type(model).__name__,
            fix="use a model of a newer architecture",
        )
    skipped = set(get_keys_to_not_convert(model))
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {id(module): name for name, module in model.named_modules()}
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    return Layout(
        shapes=shapes | {name: tuple(value.shape) for name, value in model.state_dict().items()},
        tied=dict(model.all_tied_weights_keys),
        linear={
            name: (module.out_features, module.in_features) for name, module in modules.items() if name not in skipped
        },
        kept=tuple(name for name in modules if name in skipped),
        embedding=_weight_name(names, model.get_input_embeddings()),
        head=_weight_name(names, model.get_output_embeddings()),
    )


def _weight_name(names: dict[int, str], module: nn.Module | None) -> str | None:
    return None if module is None else f"{names[id(module)]}.weight"


def _model_class(config: PretrainedConfig) -> Any:
    """The class that config.json names; a causal language model where it names none."""
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is not None:
        return found
    logging.getLogger("whet").info("config.json names no architecture of transformers: taken for a language model")
    return AutoModelForCausalLM.from_config
