"""A LoRA adapter's folder, read as what it does to each weight of its base.

    W' = W + s B A                                      s = alpha / r, or alpha / sqrt(r) (rsLoRA)
    W' = m * (W + s B A) / ||W + s B A||                (DoRA; m the learned magnitudes, the norm over a row)

An embedding is held the other way round than a linear layer ([tokens, width]), so its change is (s B A)^T and DoRA's
norm runs down the columns. Modules that were trained whole, trained rows of an embedding and trained biases stand in
place of the base's. Sources: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732; Liu et al. 2024,
arXiv:2402.09353. Shapes: A [r, in]; B [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from whet.errors import WhetError
from whet.export.json_files import read_json
from whet.export.lora_scale import lora_scale
from whet.export.merge_files import TensorFiles

PREFIX = "base_model.model."
TOKENS = "token_adapter.trainable_tokens_delta"
IN_MEMORY = 'load it with its base and save it with model.save_pretrained_merged("merged")'

# Fields of adapter_config.json that say where an adapter is and how it was trained, not what it computes.
HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "bias", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
    "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Ways to start an adapter that change no weight of the base.
STARTS = {True, False, "gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class LowRank:
    """s B A, for a weight [out, in]; transposed: for one held as [in, out]. magnitude: DoRA's m [out], or None."""

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it is added to."""
        out, into = self.up.shape[0], self.down.shape[1]
        return (into, out) if self.transposed else (out, into)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of s B A, as the weight lies, fp32."""
        if self.transposed:
            return (self.down[:, start:stop].T @ self.up.T) * self.scale
        return (self.up[start:stop] @ self.down) * self.scale

    def to(self, device: torch.device) -> LowRank:
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return LowRank(self.down.to(device), self.up.to(device), self.scale, self.transposed, magnitude)


@dataclass
class Change:
    """What an adapter does to one weight, in this order.

    replaced: the name in the adapter's files of what stands in its place. low_rank: is added. tokens: rows (ids [n],
    values [n, width]) that replace its own. shift: is added to a bias.
    """

    replaced: str | None = None
    low_rank: LowRank | None = None
    tokens: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None

    def to(self, device: torch.device) -> Change:
        return Change(
            self.replaced,
            None if self.low_rank is None else self.low_rank.to(device),
            None if self.tokens is None else (self.tokens[0].to(device), self.tokens[1].to(device)),
            None if self.shift is None else self.shift.to(device),
        )


@dataclass
class Adapter:
    """The adapter in `folder`.

    changes: name of a weight of the base -> what becomes of it. used: tensors of the files that are part of them.
    """

    folder: Path
    files: TensorFiles
    changes: dict[str, Change] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def change(self, weight: str) -> Change:
        return self.changes.setdefault(weight, Change())


def read_adapter(folder: Path) -> Adapter:
    """Read `folder`, as `save_pretrained` left it: low-rank matrices into memory, whole modules where they lie.

    Raises WhetError for kinds of adapters that do not become part of a weight, and for numbers that are not finite.
    """
    config = read_json(folder / "adapter_config.json")
    _check_kind(config, folder)
    adapter = Adapter(folder, TensorFiles(folder, "adapter_model"))
    for name in adapter.files:
        module, kind = _split(name)
        if ".original_module." in name:  # beside a module that was trained whole: what it was before
            adapter.used.add(name)
            continue
        if kind == "lora_A.weight":
            adapter.change(f"{module}.weight").low_rank = _low_rank(adapter, config, name, module, embedding=False)
        elif kind == "lora_embedding_A":
            adapter.change(f"{module}.weight").low_rank = _low_rank(adapter, config, name, module, embedding=True)
        elif kind == "lora_B.bias":
            scale = lora_scale(config, module, _rank(adapter, name))
            adapter.change(f"{module}.bias").shift = _finite(adapter, name) * scale
        elif kind == TOKENS:
            adapter.change(f"{module}.weight").tokens = (_token_ids(config, module, folder), _finite(adapter, name))
        elif kind in ("weight", "bias"):
            adapter.change(f"{module}.{kind}").replaced = name
            adapter.used.add(name)
    if unused := sorted(set(adapter.files) - adapter.used):
        what = f"holds {unused[0]}, which its adapter_config.json does not account for"
        raise WhetError(what, where=str(folder), fix="copy the adapter again from its run, or " + IN_MEMORY)
    if not adapter.changes:
        raise WhetError("the adapter holds no weights", where=str(folder), fix="save it again from the trained model")
    return adapter


def _split(name: str) -> tuple[str, str]:
    """A module of the base and what of it: "base_model.model.a.b.lora_A.weight" -> ("a.b", "lora_A.weight")."""
    plain = name.removeprefix(PREFIX)
    for wrapper in (".token_adapter.base_layer.", ".base_layer.", ".modules_to_save."):
        plain = plain.replace(wrapper, ".")
    for kind in ("lora_A.", "lora_B.", "lora_embedding_", "lora_magnitude_vector", "token_adapter."):
        if (at := plain.find(f".{kind}")) >= 0:
            return plain[:at], plain[at + 1 :]
    module, _, kind = plain.rpartition(".")
    return module, kind


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    where = str(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise WhetError(f"an adapter of kind {config.get('peft_type')} is not merged here", where=where, fix=IN_MEMORY)
    usual = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in HARMLESS | {"init_lora_weights"} and value != usual.get(name):
            raise WhetError(f"{name}={value!r} is not merged here", where=where, fix=IN_MEMORY)
    check_start(config, where)


def check_start(config: Mapping[str, Any], where: str) -> None:
    """Raise WhetError for an adapter that is not for the weights in its base's folder."""
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        what = f"the adapter started as {start!r}, which changed the base's weights too: the base's folder has others"
        raise WhetError(what, where=where, fix=IN_MEMORY)


def _low_rank(adapter: Adapter, config: Mapping[str, Any], name: str, module: str, *, embedding: bool) -> LowRank:
    up = name.replace("lora_embedding_A", "lora_embedding_B") if embedding else name.replace("lora_A.", "lora_B.")
    if up not in adapter.files:
        raise WhetError(f"{up} is missing", where=str(adapter.folder), fix="copy the adapter again from its run")
    down_matrix, up_matrix = _finite(adapter, name), _finite(adapter, up)
    rank = down_matrix.shape[0]
    if down_matrix.ndim != 2 or up_matrix.ndim != 2 or up_matrix.shape[1] != rank:
        what = f"{name} is {tuple(down_matrix.shape)} and {up} is {tuple(up_matrix.shape)}"
        raise WhetError(what, where=str(adapter.folder), fix="copy the adapter again from its run")
    magnitude = None
    if config.get("use_dora"):
        stem = name.rpartition(".lora_")[0] + ".lora_magnitude_vector"
        held = next((key for key in (stem, f"{stem}.weight") if key in adapter.files), None)
        if held is None:
            raise WhetError(f"{stem} is missing", where=str(adapter.folder), fix="copy the adapter again from its run")
        magnitude = _finite(adapter, held).flatten()
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return LowRank(down_matrix, up_matrix, lora_scale(config, module, rank), transposed, magnitude)


def _rank(adapter: Adapter, bias: str) -> int:
    """Of the pair whose B has the bias of this name."""
    return adapter.files.part(bias.replace("lora_B.bias", "lora_A.weight")).shape[0]


def _token_ids(config: Mapping[str, Any], module: str, folder: Path) -> Tensor:
    chosen = config.get("trainable_token_indices")
    if isinstance(chosen, dict):
        chosen = next((ids for key, ids in chosen.items() if f".{module}".endswith(f".{key}")), None)
    if not chosen:
        what = f"which rows of {module} were trained is not in trainable_token_indices"
        raise WhetError(what, where=str(folder / "adapter_config.json"), fix="copy the adapter again from its run")
    return torch.tensor(chosen, dtype=torch.int64)


def _finite(adapter: Adapter, name: str) -> Tensor:
    """A matrix of the adapter in fp32, which is thereby used."""
    adapter.used.add(name)
    value = adapter.files.read(name).float()
    if not value.isfinite().all():
        what = f"{name} holds numbers that are not finite: the training has diverged"
        raise WhetError(what, where=str(adapter.folder), fix="export an earlier checkpoint, or train at a lower rate")
    return value
