"""The model in memory and what runs it: a step's parts in, a drawn token a sequence out.

Everything here belongs to one thread. The architecture need not be known: any decoder of transformers that leaves its
attention to a registered function and keeps nothing but keys and values between tokens can be run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from whet.errors import WhetError
from whet.models.load import load
from whet.serve.engines.in_process import attention
from whet.serve.engines.in_process.adapters import Adapter, AdapterHooks, load_adapter
from whet.serve.engines.in_process.attention import Probe, Shape
from whet.serve.engines.in_process.batch import pack
from whet.serve.engines.in_process.pages import Capacity, PageTable, allocate, capacity
from whet.serve.engines.in_process.sampling import Drawn, draw
from whet.serve.engines.in_process.scheduler import Part
from whet.serve.engines.in_process.settings import Settings
from whet.serve.engines.in_process.vocabulary import Vocabulary

CPU_CACHE = 2 << 30  # bytes
CPU_STEP, GPU_STEP = 512, 4096  # tokens of prompts
GPU_SHARE = 0.8  # of the memory that is free once the weights are loaded
OTHER_ATTENTION = "serve this model through vLLM, or export it to GGUF"


class Runner:
    """Loads a model folder and runs steps over pages of its own."""

    def __init__(self, folder: str, settings: Settings):
        self.model, self.tokenizer = _loaded(folder, settings)
        self.device: torch.device = self.model.device
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            leave_a_core()
        self.step_tokens = settings.step_tokens or (CPU_STEP if on_cpu else GPU_STEP)
        self.vocabulary = Vocabulary(self.tokenizer, _ends(self.model, self.tokenizer), _rows(self.model))
        shapes = _probe(self.model, folder)
        self.size = _capacity(self.model, shapes, settings, folder)
        self.table = PageTable(self.size)
        self._layers = allocate(shapes, self.size.pages, self.device)
        self._hooks = AdapterHooks(self.model)

    def read_adapter(self, name: str, folder: Path) -> Adapter:
        """From any thread: nothing of the model is changed. `cover` it between steps before a sequence uses it."""
        return load_adapter(self.model, name, folder)

    def cover(self, adapter: Adapter) -> None:
        self._hooks.cover(adapter)

    @torch.inference_mode()
    def run(self, parts: Many[Part]) -> list[tuple[Part, Drawn | None]]:
        """One forward pass; the sequences that are through with their tokens, and what was drawn for each."""
        batch = pack(parts, self.table, self._layers, self.device)
        self._hooks.segments = batch.segments
        try:
            logits_RV = self._forward(batch.token_ids, batch.positions, batch.rows, batch.step)
        finally:
            self._hooks.segments = ()
        for part in batch.parts:
            part.sequence.computed += part.count
        through = [part for part in batch.parts if part.count and part.sequence.left == 0]
        if not through:
            return []
        return list(zip(through, draw(logits_RV, [part.sequence.drawing for part in through]), strict=True))

    def clear(self, row: int) -> None:
        """Zero the pages of a row: what is no number there must not reach whoever gets them next."""
        held = self.table.table[row, : self.table.held[row]].tolist()
        for pages in self._layers.values():
            pages.keys[held] = 0
            pages.values[held] = 0

    def _forward(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: attention.Step) -> Tensor:
        out = self.model(input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=rows, paged=step)
        logits: Tensor = out.logits[0]
        return logits


def leave_a_core() -> None:
    """Keep one core for the rest of the server. A thread of torch's that has to share its core holds up all others:
    they wait for each other several times a layer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores - 1)))


def _loaded(folder: str, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load(
        folder,
        precision="16bit",
        dtype=settings.dtype,
        attn_implementation=attention.register(),
        device_map=settings.device_map,
    )
    model.train(False)
    tokenizer.name_or_path = ""  # a path on this machine, which a refusal of the template would tell to the client
    if not getattr(model, "_supports_attention_backend", False):
        raise WhetError("this architecture brings its own attention", where=folder, fix=OTHER_ATTENTION)
    if "dynamic" in _rope_types(model):
        what = "dynamic rope scaling gives a token other keys as its sequence grows"
        raise WhetError(what, where=folder, fix=OTHER_ATTENTION)
    return model, tokenizer


@torch.inference_mode()
def _probe(model: PreTrainedModel, folder: str) -> dict[int, Shape]:
    """What each layer's keys look like, from one token's way through the model."""
    probe = Probe()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        model(input_ids=token, position_ids=token, use_cache=False, logits_to_keep=1, paged=probe)
    except (TypeError, NotImplementedError, AttributeError) as error:
        raise WhetError(
            f"this architecture can't be run in pages: {error}", where=folder, fix=OTHER_ATTENTION
        ) from None
    if len(probe.shapes) != model.config.get_text_config().num_hidden_layers:
        what = "some of this architecture's layers keep more than keys and values, or share them"
        raise WhetError(what, where=folder, fix=OTHER_ATTENTION)
    return probe.shapes


def _capacity(model: PreTrainedModel, shapes: dict[int, Shape], settings: Settings, folder: str) -> Capacity:
    budget = settings.cache_bytes
    if budget is None:
        free = int(torch.cuda.mem_get_info(model.device)[0] * GPU_SHARE) if model.device.type == "cuda" else CPU_CACHE
        budget = free
    bytes_a_token = sum(shape.bytes_a_token for shape in shapes.values())
    context = min(_context(model), settings.context or _context(model))
    size = capacity(bytes_a_token, budget, settings.max_running, context)
    if size.pages < 2:
        what = f"{budget} bytes hold no keys of this model: a token takes {bytes_a_token}"
        raise WhetError(what, where=f"{folder}: cache_bytes", fix="give the cache more memory")
    return size


def _context(model: PreTrainedModel) -> int:
    """Tokens the model was made for. With long-range rope factors (Phi 3) those before the factors change: the pages
    of a sequence hold keys by one set of factors."""
    config: Any = model.config.get_text_config()
    if "longrope" in _rope_types(model):
        rope = config.rope_parameters
        return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    return int(getattr(config, "max_position_embeddings", None) or 2048)


def _rope_types(model: PreTrainedModel) -> set[str]:
    """Of the model's layers: config.json holds one set of parameters, or one for each type of layer."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    return {str(kind["rope_type"]) for kind in kinds if "rope_type" in kind}


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})


def _rows(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)
