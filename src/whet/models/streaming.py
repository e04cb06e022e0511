"""Has transformers read a model's weights through models/readahead.py, where they go to one GPU.

transformers copies one tensor at a time from pageable memory when it quantizes on the way: most of the time that
loading takes. Nothing of transformers is changed: `streamed` stands for a model's class while it loads, and hands the
step that reads the files a dict of tensors that are read when they are asked for.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import modeling_utils
from transformers.modeling_utils import PreTrainedModel

from whet.models.readahead import Gpu, Host, Reader

log = logging.getLogger("whet")

ARGUMENTS = ["model", "state_dict", "checkpoint_files", "load_config"]  # of the step that reads


def streamed(auto_model: Any) -> Any:
    """`auto_model`, a model's class or one of transformers' Auto classes, whose `from_pretrained` reads as said above.

    Only where all weights go to one CUDA device. All else, and code from the hub, is read by transformers as ever.
    """
    step = getattr(PreTrainedModel, "_load_pretrained_model", None)
    if step is None or list(inspect.signature(step).parameters)[: len(ARGUMENTS)] != ARGUMENTS:
        log.info("this version of transformers reads weights in another way: whet leaves it to read them alone")
        return auto_model
    if (models := getattr(auto_model, "_model_mapping", None)) is not None:
        return type(auto_model.__name__, (auto_model,), {"_model_mapping": _Models(models)})
    return _reading(auto_model)


class _Models:
    """An Auto class's table from configurations to models."""

    def __init__(self, models: Any):
        self.models = models

    def __getitem__(self, config: type) -> Any:
        found = self.models[config]
        return [_reading(x) for x in found] if isinstance(found, list | tuple) else _reading(found)

    def __contains__(self, config: type) -> bool:
        return config in self.models

    def __iter__(self) -> Iterator[type]:
        return iter(self.models)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.models, name)


def _reading(kind: Any) -> Any:
    """A class with a `from_pretrained` of its own may need to be itself there: it stays as it is."""
    own = getattr(getattr(kind, "from_pretrained", None), "__func__", None)
    return _Reading(kind) if own is PreTrainedModel.from_pretrained.__func__ else kind


class _Reading:
    """Stands for a model's class in `from_pretrained`, which makes a model of the class itself."""

    def __init__(self, kind: type[PreTrainedModel]):
        self.kind, self.__module__ = kind, kind.__module__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)

    def __call__(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.kind(*args, **kwargs)

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return PreTrainedModel.from_pretrained.__func__(self, *args, **kwargs)

    def _load_pretrained_model(
        self, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        step = self.kind._load_pretrained_model
        plain = state_dict is not None or getattr(load_config, "disable_mmap", False)
        device = None if plain else _place(load_config.device_map)
        if device is None or not checkpoint_files or not all(map(_readable, checkpoint_files)):
            return step(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        with Reader(device) as reader:
            for file in checkpoint_files:
                reader.open(file)
            return step(model, reader.tensors, checkpoint_files, load_config, *args, **kwargs)


def _place(device_map: Any) -> Host | None:
    """The one CUDA device that holds everything. None where there is none."""
    places = {f"cuda:{x}" if isinstance(x, int) else str(x) for x in (device_map or {}).values()}
    if len(places) != 1 or not torch.cuda.is_available() or not hasattr(os, "preadv"):
        return None
    (name,) = places
    if not name.startswith("cuda"):
        return None
    return Gpu(torch.device(name if ":" in name else f"cuda:{torch.cuda.current_device()}"))


def _readable(file: str) -> bool:
    on_hub_mount = getattr(modeling_utils, "_is_on_hf_mount", lambda _: False)  # which transformers reads in one go
    return str(file).endswith(".safetensors") and not on_hub_mount(file)
