"""Merge the LoRA adapter of a model in memory into its base and write the result as a plain transformers folder.

    W' = W + s * B A            (LoRA)
    W' = m * (W + s * B A) / ||W + s * B A||_row      (DoRA, m the learned magnitudes)

The sum is taken in fp32 and rounded once, a layer at a time where the layer lies; the host holds a strip of it. W is
either what training saw (the quantized base, dequantized) or the original 16-bit weights, read again from the model's
source; the caller says which. `merge_stream` does the same from folders, without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import bitsandbytes.functional as bnb
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora_layers
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from whet.errors import WhetError
from whet.export.compressed import SCHEMES
from whet.export.merge_base import Base
from whet.export.merge_files import TensorFiles
from whet.export.merge_formats import Format, Plain, alike, rounded, write_weights
from whet.export.merge_layout import layout_of, read_layout
from whet.export.merge_stream import form_of, remove_older_weights, untie, without_quantization, write_config
from whet.files import staged_folder
from whet.models.load import load_config

# save_method -> the name that `merge_folders` has for the format
QUANTIZED = {"merged_4bit": "nf4"} | {f"merged_{name}": name for name in SCHEMES}
MERGE_METHODS = ("lora", "merged_16bit", *QUANTIZED)
BASES = ("dequantized", "original")

Wrapper: TypeAlias = Any
"""A module of PEFT's around a layer: torch types a module's attributes as tensors, so no stricter type holds."""


def save_merged(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    method: str = "merged_16bit",
    base: str = "dequantized",
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    **kwargs: Any,
) -> None:
    """Write `model` to `folder`: all of it, or nothing.

    method: "merged_16bit"; "merged_4bit" (NF4 in bitsandbytes' layout); "merged_fp8", "merged_int8" or "merged_w4a16"
    (see `compressed`); or "lora" (the adapter alone).
    base: "dequantized" or "original", see above. dtype: of what is not quantized; bf16 unless the model computes in
    fp16. max_shard_size: bytes of a file, or "5GB". kwargs: for method="lora", arguments of PEFT's `save_pretrained`.
    """
    if method not in MERGE_METHODS:
        raise WhetError(
            f"unknown save_method {method!r}", where="save_method", fix=f"use one of {', '.join(MERGE_METHODS)}"
        )
    if base not in BASES:
        raise WhetError(f"unknown base {base!r}", where="base", fix=f"use one of {', '.join(BASES)}")
    if method == "lora" and not isinstance(model, PeftModel):
        raise WhetError("the model has no adapter", where="save_method='lora'", fix="save_method='merged_16bit'")
    unknown = sorted(kwargs.keys() - {"safe_serialization"}) if method != "lora" else []
    if unknown or kwargs.get("safe_serialization") is False:
        name = unknown[0] if unknown else "safe_serialization=False"
        raise WhetError("a merged model is not written that way", where=name, fix=f"leave {name.partition('=')[0]} out")
    with staged_folder(folder) as staged:
        if method == "lora":
            model.save_pretrained(str(staged), **kwargs)
        else:
            _write_merged(model, staged, method, base, dtype, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        written = {path.name for path in staged.iterdir()}
    if method != "lora":
        remove_older_weights(folder, written)


def merged_state_dict(model: PreTrainedModel | PeftModel, base: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight of the base model under its own name, adapters added, in `dtype` on the CPU. A copy of them all."""
    source = MergedModel(model, base)
    found = {}
    for name in [*source.names, *source.shared]:
        rows = source.whole(name)
        found[name] = rows.to("cpu", dtype if rows.is_floating_point() else rows.dtype).contiguous()
    return found


@dataclass
class _Place:
    """A weight of the merged model: its shape, what gives its value, whole, and the dtype if that is no float."""

    shape: tuple[int, ...]
    value: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32


class MergedModel:
    """The weights of a model in memory with its active adapters added. A `Source`.

    untied: the head has values of its own, though the model's config shares those of the embedding. shared: the names
    of weights that have another's values and are not written.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, base: str = "dequantized"):
        self.plain = _without_adapters(model)
        self._originals = _originals(self.plain) if base == "original" else None
        self._tied = dict(getattr(self.plain, "all_tied_weights_keys", None) or {})
        self._last: tuple[str, Tensor] | None = None
        self._places: dict[str, _Place] = {}
        for name, module in self.plain.named_modules():
            self._add(name, module)
        self.shared = [
            head
            for head, embedding in self._tied.items()
            if head in self._places and embedding in self._places and alike(self, head, embedding)
        ]
        self.untied = any(head in self._places and head not in self.shared for head in self._tied)
        self.names = [name for name in self._places if name not in self.shared]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """fp32 for every float: what is summed."""
        return self._places[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found = self.whole(name)
        rows = found[start:stop] if found.ndim else found
        return rows.float() if rows.is_floating_point() else rows

    def whole(self, name: str) -> Tensor:
        """All of a weight, where it lies. The one that was asked for last stays."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._places[name].value().detach())
        return self._last[1]

    def _add(self, name: str, module: nn.Module) -> None:
        """Note the weights of one module. What lies within an adapter is taken with the adapter."""
        if isinstance(module, LoraLayer):
            self._add_lora(name, module)
        elif isinstance(module, ModulesToSaveWrapper):
            active = module.modules_to_save[module.active_adapters[0]]
            for key, value in active.state_dict().items():
                self._put(f"{name}.{key}", tuple(value.shape), _held(value))
        elif isinstance(module, TrainableTokensWrapper):
            shape = tuple(module.original_module.weight.shape)
            self._put(f"{name}.weight", shape, partial(self._with_tokens, f"{name}.weight", module))
        elif not _inside_wrapper(name):
            for key, parameter in module.named_parameters(recurse=False):
                value = partial(self._base, f"{name}.{key}", module, key, parameter)
                self._put(f"{name}.{key}", _shape(parameter), value)
            for key, buffer in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set:
                    dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
                    self._put(f"{name}.{key}", tuple(buffer.shape), _held(buffer), dtype)

    def _add_lora(self, name: str, layer: Wrapper) -> None:
        _check_layer(name, layer)
        base = layer.get_base_layer()
        if _inside_wrapper(name):
            return
        self._put(f"{name}.weight", _shape(base.weight), partial(self._with_adapters, f"{name}.weight", layer))
        if getattr(base, "bias", None) is not None:
            self._put(f"{name}.bias", tuple(base.bias.shape), partial(_bias, layer))

    def _put(
        self, name: str, shape: tuple[int, ...], value: Callable[[], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self._places[name.removeprefix(".")] = _Place(shape, value, dtype)

    def _base(self, name: str, module: nn.Module, key: str, parameter: Tensor) -> Tensor:
        if self._originals is None:
            return dequantize(module, key, parameter)
        held = name if name in self._originals.names else self._tied.get(name, name)
        if held not in self._originals.names:
            what = f"{name} is not in the model's source"
            raise WhetError(what, where="base='original'", fix="base='dequantized'")
        return self._originals.rows(held, 0, self._originals.shape(held)[0] if self._originals.shape(held) else 1)

    def _with_adapters(self, name: str, layer: Wrapper) -> Tensor:
        """The weight of a LoRA layer with its active adapters added, fp32."""
        base = layer.get_base_layer()
        weight = self._base(name, base, "weight", base.weight).detach().to(base.weight.device).float()
        for adapter in layer.active_adapters:
            if adapter not in layer.scaling:
                continue
            weight = weight + layer.get_delta_weight(adapter).detach().float().to(weight.device)
            if adapter in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float().to(weight.device)
                # an embedding lies the other way round, and so does its norm
                down = isinstance(layer, lora_layers.Embedding) or getattr(layer, "fan_in_fan_out", False)
                ratio = magnitude / weight.norm(dim=0 if down else 1)
                weight = weight * (ratio if down else ratio[:, None])
        return weight

    def _with_tokens(self, name: str, wrapper: Wrapper) -> Tensor:
        """An embedding, or a head, of which some rows were trained."""
        layer = wrapper.token_adapter
        weight = self._base(name, wrapper.original_module, "weight", wrapper.original_module.weight).detach().float()
        for adapter in layer.active_adapters:
            ids = torch.tensor(layer.token_indices[adapter], device=weight.device)
            weight = weight.index_copy(0, ids, layer.trainable_tokens_delta[adapter].detach().to(weight))
        return weight


def _without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _held(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def dequantize(module: nn.Module, key: str, parameter: Tensor) -> Tensor:
    """A parameter in floating point: NF4 and 8-bit weights as the forward pass sees them, others as they are."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return bnb.dequantize_4bit(parameter.data, state)
    if parameter.dtype == torch.int8 and key == "weight":
        holder: Any = parameter if getattr(parameter, "SCB", None) is not None else module.state
        whole: Tensor = bnb.int8_vectorwise_dequant(parameter.data, holder.SCB)
        return whole
    return parameter


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the weight; 4-bit ones lie in memory in another."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def _bias(layer: Wrapper) -> Tensor:
    """The bias of a LoRA layer, with the adapters' own where they have one."""
    bias: Tensor = layer.get_base_layer().bias.detach()
    for adapter in layer.active_adapters:
        if layer.lora_bias.get(adapter):
            bias = bias.float() + layer.lora_B[adapter].bias.detach().float() * layer.scaling[adapter]
    return bias


def _check_layer(name: str, layer: Wrapper) -> None:
    """Raise WhetError for an adapter that is more than a matrix added to a weight."""
    kinds = {type(variant).__name__ for variant in layer.lora_variant.values() if variant is not None}
    other = sorted(kind for kind in kinds if not kind.startswith("Dora"))
    if isinstance(layer, lora_layers.ParamWrapper):
        other = ["ParamWrapper"]
    if other:
        fix = "save_method='lora' keeps the adapter as it is"
        raise WhetError(f"adapters of kind {other[0]} are not merged", where=name, fix=fix)


def _inside_wrapper(name: str) -> bool:
    """Whether a module is part of an adapter, or the base under one, and so was taken with its wrapper."""
    inner = ("base_layer", "original_module", "modules_to_save", "token_adapter")
    return any(part in inner or part.startswith("lora_") for part in name.split("."))


def _originals(plain: PreTrainedModel) -> Base:
    """The 16-bit weights in the folder, or the hub's cache, that the model was loaded from."""
    source = plain.config._name_or_path
    if not source:
        raise WhetError(
            "the model does not know where it was loaded from", where="base='original'", fix="base='dequantized'"
        )
    config: PretrainedConfig = load_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise WhetError(f"{source} itself is quantized", where="base='original'", fix="base='dequantized'")
    folder = Path(str(cached_file(source, "config.json"))).parent
    return Base(TensorFiles(folder), config, layout_of(config), None, torch.float32, torch.device("cpu"))


def _write_merged(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    method: str,
    base: str,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
) -> None:
    source = MergedModel(model, base)
    plain = source.plain
    dtype = dtype or (torch.float16 if plain.dtype == torch.float16 else torch.bfloat16)
    config = without_quantization(plain.config)
    config.architectures = [type(plain).__name__]
    if source.untied:
        untie(config)
    with torch.device("meta"):
        shell = type(plain)(config)
        nn.Module.to(shell, dtype)
    form: Format = Plain(dtype)
    if method in QUANTIZED:
        form, _ = form_of(QUANTIZED[method], read_layout(shell), dtype)
    if getattr(plain, "_weight_conversions", None) and method == "merged_16bit":
        _write_renamed(source, shell, folder, dtype, max_shard_size)
    else:
        write_weights(source, form, folder, max_shard_size)
    write_config(config, form, folder)
    if plain.can_generate() and plain.generation_config is not None:
        plain.generation_config.save_pretrained(folder)


def _write_renamed(
    source: MergedModel, shell: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: int | str
) -> None:
    """Write a model whose files hold its weights under other names, or joined otherwise, through transformers.

    It needs all of them at once: host memory holds the merged model.
    """
    weights = {}
    for name in source.names:
        rows = source.whole(name)
        weights[name] = (rounded(name, rows, dtype) if rows.is_floating_point() else rows).cpu().contiguous()
    shell.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
