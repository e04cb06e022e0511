"""LoRA adapters on one shared base, several at once in one batch.

    y = W x + s * B A x                          (LoRA)
    y = b + m / ||W + s B A||_row * (W + s B A) x     (DoRA)

The base's linear layers stay as they are; a hook on each adds, to the outputs of an adapter's tokens, that adapter's
change. A step's tokens lie beside each other by adapter, so a change costs two thin products over a slice.

Source: Hu et al. 2021, arXiv:2106.09685; Chen et al. 2023, arXiv:2310.18547 (many adapters in one batch).
Shapes: x [N, in], A [r, in], B [out, r], m [out].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from whet.errors import WhetError
from whet.export.json_files import read_json
from whet.export.lora_scale import lora_scale

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
MERGE = "merge it (whet export --merged) and serve the merged folder"


@dataclass(frozen=True)
class Change:
    """An adapter's part in one linear layer. scale is in B already. rescale: DoRA's m / ||W + s B A|| [out], if any."""

    A: Tensor
    B: Tensor
    rescale: Tensor | None = None

    def apply(self, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        """Change y [N, out], the base's output for x [N, in], in place."""
        y += (x.to(self.A.dtype) @ self.A.T) @ self.B.T
        if self.rescale is not None:
            if bias is not None:
                y -= bias
            y *= self.rescale
            if bias is not None:
                y += bias


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: its changes by the linear layer's name in the model."""

    name: str
    changes: dict[str, Change]


@dataclass(frozen=True)
class Segment:
    """Which tokens of the packed row are an adapter's, and which of the rows that get logits: half-open ranges."""

    adapter: Adapter
    tokens: tuple[int, int]
    rows: tuple[int, int]


class AdapterHooks:
    """Puts hooks on the linear layers that adapters change, as they are loaded. `segments` says whose tokens run."""

    def __init__(self, model: nn.Module):
        self.segments: Sequence[Segment] = ()
        self._model = model
        self._head = getattr(model, "get_output_embeddings", lambda: None)()
        self._hooked: set[str] = set()

    def cover(self, adapter: Adapter) -> None:
        for name in adapter.changes.keys() - self._hooked:
            module = self._model.get_submodule(name)
            module.register_forward_hook(self._hook(name, of_rows=module is self._head))
            self._hooked.add(name)

    def _hook(self, name: str, of_rows: bool) -> Any:
        def add_changes(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.segments:
                return output
            x, y = args[0].reshape(-1, args[0].shape[-1]), output.view(-1, output.shape[-1])
            bias: Any = getattr(module, "bias", None)
            for segment in self.segments:
                change = segment.adapter.changes.get(name)
                if change is not None:
                    first, end = segment.rows if of_rows else segment.tokens
                    change.apply(x[first:end], y[first:end], bias)
            return output

        return add_changes


def adapter_folder(root: Path, name: str) -> Path | None:
    """The folder of the adapter `name` directly in `root`; None for any other name, links out of `root` included."""
    if not NAME.fullmatch(name):
        return None
    folder = root / name
    if not (folder / "adapter_config.json").is_file() or folder.resolve().parent != root.resolve():
        return None
    return folder


def check_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise WhetError(
            f"{name!r} can't name an adapter", where="adapter", fix="use letters, digits, '.', '_' and '-', up to 128"
        )
    return name


def load_adapter(model: nn.Module, name: str, folder: Path) -> Adapter:
    """Read a PEFT folder for `model`, in the model's own dtype and on its device.

    Raises WhetError for what is no LoRA, for parts that can't be added while other adapters run on the same base
    (biases, whole modules, embeddings), and for weights that do not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_name(name)
    config = _config(folder)
    weights_file = folder / "adapter_model.safetensors"
    try:
        weights = load_file(weights_file)
    except (OSError, SafetensorError) as error:
        raise WhetError(f"the adapter's weights can't be read: {error}", where=str(weights_file)) from None
    found: dict[str, dict[str, Tensor]] = {}
    for key, weight in weights.items():
        match = _KEY.fullmatch(key)
        if match is None and _is_base_s_own(model, key, weight):
            continue
        if match is None:
            raise WhetError(f"{key} can't be added to a shared base", where=str(weights_file), fix=MERGE)
        found.setdefault(match[1], {})[match[2]] = weight
    if not found:
        raise WhetError("the adapter holds no weights", where=str(weights_file), fix="save the adapter again")
    changes = {layer: _change(model, layer, parts, config, weights_file) for layer, parts in found.items()}
    return Adapter(name, changes)


def _is_base_s_own(model: nn.Module, key: str, weight: Tensor) -> bool:
    """PEFT saves an output head's base weight beside its adapter; it says nothing new where it is the base's."""
    own = dict(model.named_parameters(remove_duplicate=False)).get(
        key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    )
    return own is not None and own.shape == weight.shape and torch.equal(own.detach().cpu(), weight.to(own.dtype))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise WhetError("this is no LoRA adapter", where=str(path), fix="give the folder of a LoRA adapter")
    for field in ("modules_to_save", "trainable_token_indices", "fan_in_fan_out", "lora_bias", "target_parameters"):
        if config.get(field):
            raise WhetError(f"{field} can't be served on a shared base", where=str(path), fix=MERGE)
    if config.get("bias", "none") != "none":
        raise WhetError("trained biases can't be served on a shared base", where=str(path), fix=MERGE)
    return config


def _change(model: nn.Module, layer: str, parts: dict[str, Tensor], config: dict[str, Any], where: Path) -> Change:
    try:
        module: Any = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        fix = f"serve the base that it was trained on, or {MERGE}"
        raise WhetError(f"the base has no linear layer {layer}", where=str(where), fix=fix)
    if not {"lora_A", "lora_B"} <= parts.keys():
        raise WhetError(f"the adapter lacks a part of {layer}", where=str(where), fix="save the adapter again")
    A, B = parts["lora_A"], parts["lora_B"]
    rank = A.shape[0]
    if A.shape != (rank, module.in_features) or B.shape != (module.out_features, rank):
        raise WhetError(
            f"{layer} is {module.in_features} -> {module.out_features} in the base, "
            f"but {A.shape[1]} -> {B.shape[0]} in the adapter",
            where=str(where),
            fix="serve the base that it was trained on",
        )
    scaled = B.float() * lora_scale(config, layer, rank)
    magnitudes = parts.get("lora_magnitude_vector")
    rescale = None if magnitudes is None else _rescale(module, A, scaled, magnitudes, where)
    dtype, device = _compute_dtype(module), module.weight.device
    return Change(A.to(device, dtype), scaled.to(device, dtype), None if rescale is None else rescale.to(device, dtype))


def _rescale(module: nn.Linear, A: Tensor, scaled: Tensor, magnitudes: Tensor, where: Path) -> Tensor:
    """m / ||W + s B A||, by output, in fp32."""
    if not module.weight.is_floating_point():
        raise WhetError("DoRA can't be served on a quantized base", where=str(where), fix=MERGE)
    weight = module.weight.detach().float().cpu()
    rescale: Tensor = magnitudes.float().flatten() / torch.linalg.vector_norm(weight + scaled @ A.float(), dim=1)
    return rescale


def _compute_dtype(module: Any) -> torch.dtype:
    """Of the layer's outputs; quantized layers say which."""
    if module.weight.is_floating_point():
        dtype: torch.dtype = module.weight.dtype
        return dtype
    return getattr(module, "compute_dtype", None) or torch.bfloat16
