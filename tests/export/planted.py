"""A tuned tiny model with everything that an export makes of it, and ways to break each piece on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.tiny_models import save_tiny
from whet.export.gguf import write_gguf
from whet.export.gguf_adapter import write_gguf_adapter
from whet.export.merge import save_merged
from whet.export.proof import Reference
from whet.export.proof.prompts import general_prompts

TensorChange = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Tuned:
    """A base with a trained-like adapter. folder: what is made of it, each under its name, when it is asked for."""

    model: PeftModel
    reference: Reference
    folder: Path

    def merged(self, format: str = "fp32") -> Path:
        path = self.folder / f"merged-{format}"
        if not path.exists():
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[format]
            save_merged(self.model, path, self.reference.tokenizer, dtype=dtype)
        return path

    def gguf(self, quantization: str = "f32", merged: Path | None = None) -> Path:
        source = merged or self.merged()
        path = self.folder / f"{source.name}-{quantization}.gguf"
        if not path.exists():
            write_gguf(source, path, quantization, check=False)
        return path

    def adapter(self) -> tuple[Path, Path, Path]:
        """The adapter as GGUF, its base as F32 GGUF, and the folder of the base."""
        path, base, folder = self.folder / "adapter.gguf", self.folder / "base.gguf", self.folder / "base"
        if not path.exists():
            self.model.save_pretrained(self.folder / "saved", save_embedding_layers=False)
            write_gguf_adapter(self.folder / "saved", folder, path)
            write_gguf(folder, base, "f32", check=False)
        return path, base, folder

    def merged_with(self, name: str, scale: Callable[[str, float], float]) -> Path:
        """A merge in which each layer's adapter has another scale: `scale` of the layer's name and the true one."""
        path = self.folder / name
        with other_scales(self.model, scale):
            save_merged(self.model, path, self.reference.tokenizer, dtype=torch.float32)
        return path


def tune(folder: Path, family: str = "llama", retokenize: Callable[[Any], None] | None = None, **changes: Any) -> Tuned:
    """A tiny model of a family with an adapter on all its linear layers, asked two prompts.

    retokenize: changes its tokenizer.
    """
    base = save_tiny(folder / "base", family, changes)
    if retokenize:
        change_tokenizer(base, retokenize)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, adapter)
    train_like(tuned)
    return Tuned(tuned, Reference.of(tuned, tokenizer, general_prompts(tokenizer)[:2]), folder)


def train_like(model: Any) -> None:
    """Move B, which starts as zero, so that the adapter changes every layer."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.03 * torch.randn(parameter.shape, generator=generator)


@contextmanager
def other_scales(model: PeftModel, scale: Callable[[str, float], float]) -> Iterator[None]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    before = {name: dict(layer.scaling) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.scaling.update({adapter: scale(name, value) for adapter, value in before[name].items()})
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.scaling.update(before[name])


# ---------------------------------------------------------------- folders


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: value.contiguous() for name, value in weights.items()}, path, {"format": "pt"})


def change_tokenizer(folder: Path, change: Callable[[Any], None]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- GGUF files


def rewritten(
    source: Path, to: Path, fields: Mapping[str, Any] | None = None, tensors: Mapping[str, TensorChange] | None = None
) -> Path:
    """A copy of a GGUF file with other values of some fields, and some F32 tensors changed."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = (fields or {}).get(key, field.contents())
        writer.add_key_value(key, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        data = (tensors or {}).get(tensor.name, lambda x: x)(tensor.data)
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def contents(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def swapped(values: list[Any], a: int, b: int) -> list[Any]:
    values = list(values)
    values[a], values[b] = values[b], values[a]
    return values


def halves_for_pairs(heads: int) -> TensorChange:
    """Rows within each head put back as transformers has them, which llama.cpp rotates wrongly."""

    def change(x: NDArray[Any]) -> NDArray[Any]:
        return x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return change
