"""Merge a LoRA adapter into its base and write the result as a plain transformers folder.

    W' = W + s * B A            (LoRA)
    W' = m * (W + s * B A) / ||W + s * B A||_row      (DoRA, m the learned magnitudes)

The sum is taken in fp32 and rounded once. W is either what training saw (the quantized base, dequantized) or the
original 16-bit weights, read again from the model's source; the caller says which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from whet.errors import WhetError
from whet.files import staged_folder
from whet.models.load import nf4_config

MERGE_METHODS = ("lora", "merged_16bit", "merged_4bit")
BASES = ("dequantized", "original")


def save_merged(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    method: str = "merged_16bit",
    base: str = "dequantized",
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> None:
    """Write `model` to `folder`: all of it, or nothing.

    method: "merged_16bit", "merged_4bit" (NF4 in bitsandbytes' layout) or "lora" (the adapter alone).
    base: "dequantized" or "original", see above. dtype: of the 16-bit weights; bf16 unless the model computes in fp16.
    kwargs: further arguments of transformers' `save_pretrained`, such as max_shard_size.
    """
    if method not in MERGE_METHODS:
        raise WhetError(
            f"unknown save_method {method!r}", where="save_method", fix=f"use one of {', '.join(MERGE_METHODS)}"
        )
    if base not in BASES:
        raise WhetError(f"unknown base {base!r}", where="base", fix=f"use one of {', '.join(BASES)}")
    if method == "lora" and not isinstance(model, PeftModel):
        raise WhetError("the model has no adapter", where="save_method='lora'", fix="save_method='merged_16bit'")
    with staged_folder(folder) as staged:
        if method == "lora":
            model.save_pretrained(staged, **kwargs)
        else:
            _write_merged(model, staged, base, dtype, kwargs)
        if method == "merged_4bit":
            _quantize_folder(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        written = {path.name for path in staged.iterdir()}
    if method != "lora":
        # an older export's single file is read before new shards, and its shards would only take up space
        for weights in folder.glob("model*.safetensors*"):
            if weights.name not in written:
                weights.unlink()


def merged_state_dict(model: PreTrainedModel | PeftModel, base: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight of the base model under its own name, adapters added, in `dtype` on the CPU."""
    originals = _original_weights(model) if base == "original" else {}
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    weights: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        if isinstance(module, LoraLayer):
            weights |= {
                f"{name}.{key}": value for key, value in _merged_layer(module, originals.get(f"{name}.weight")).items()
            }
        elif isinstance(module, ModulesToSaveWrapper):
            active = module.modules_to_save[module.active_adapters[0]]
            weights |= {f"{name}.{key}": value for key, value in active.state_dict().items()}
        elif not _inside_wrapper(name):
            for key, parameter in module.named_parameters(recurse=False):
                original = originals.get(f"{name}.{key}")
                weights[f"{name}.{key}"] = dequantize(module, key, parameter) if original is None else original
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set:
                    weights[f"{name}.{key}"] = buffer
    return {name: _to(value.detach(), dtype) for name, value in weights.items()}


def dequantize(module: nn.Module, key: str, parameter: Tensor) -> Tensor:
    """A parameter in floating point: NF4 and 8-bit weights as the forward pass sees them, others as they are."""
    if getattr(parameter, "quant_state", None) is not None:
        return bnb.dequantize_4bit(parameter.data, parameter.quant_state)
    if parameter.dtype == torch.int8 and key == "weight":
        scale = parameter.SCB if getattr(parameter, "SCB", None) is not None else module.state.SCB
        return bnb.int8_vectorwise_dequant(parameter.data, scale)
    return parameter


def _merged_layer(layer: LoraLayer, original: Tensor | None) -> dict[str, Tensor]:
    """weight (and bias) of a LoRA layer with its active adapters added, fp32."""
    base = layer.get_base_layer()
    weight = (dequantize(base, "weight", base.weight) if original is None else original).detach().float()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach().float().to(weight.device)
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
            weight = weight * (magnitude / weight.norm(dim=1))[:, None]
    merged = {"weight": weight}
    if getattr(base, "bias", None) is not None:
        merged["bias"] = base.bias
    return merged


def _inside_wrapper(name: str) -> bool:
    """Whether a module is part of an adapter, or the base under one, and so was taken with its wrapper."""
    parts = name.split(".")
    return any(p in ("base_layer", "original_module", "modules_to_save") or p.startswith("lora_") for p in parts)


def _original_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The 16-bit weights from the folder or hub name that the model was loaded from."""
    source = model.config._name_or_path
    if not source:
        raise WhetError(
            "the model does not know where it was loaded from", where="base='original'", fix="base='dequantized'"
        )
    original = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    if getattr(original, "is_quantized", False):
        raise WhetError(f"{source} itself is quantized", where="base='original'", fix="base='dequantized'")
    return dict(original.state_dict())


def _write_merged(
    model: PreTrainedModel | PeftModel, folder: Path, base: str, dtype: torch.dtype | None, kwargs: Any
) -> None:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = dtype or (torch.float16 if plain.dtype == torch.float16 else torch.bfloat16)
    config = type(plain.config).from_dict(
        {k: v for k, v in plain.config.to_dict().items() if k != "quantization_config"}
    )
    config.use_cache = True
    with torch.device("meta"):
        shell = type(plain)(config).to(dtype)
    if plain.generation_config is not None:
        shell.generation_config = plain.generation_config
    shell.save_pretrained(folder, state_dict=merged_state_dict(model, base, dtype), **kwargs)


def _quantize_folder(folder: Path) -> None:
    """Replace a folder's 16-bit weights by NF4 with double quantization."""
    nf4 = nf4_config(torch.bfloat16)
    device = 0 if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype="auto", device_map={"": device})
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    model.save_pretrained(folder)


def _to(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
