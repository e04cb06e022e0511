"""Embedding models in a sentence-transformers folder: an encoder, a pooling of its outputs, unit length where asked.

    cls: the first token's output    mean: the mean over tokens    max: the largest over tokens    lasttoken: the last's

Texts of all requests go through one thread, sorted by length so that little is padding. Other modules than these three
(dense layers, for one) are refused by name.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whet.errors import WhetError
from whet.models.load import load
from whet.serve.engines.in_process.settings import Settings
from whet.serve.engines.messages import check_ids
from whet.serve.interface import Busy, Embedded, EngineDown, Piece, Refused, Request, ServedModel, UnknownModel

BATCH = 32  # texts at once
POOLINGS = ("cls", "mean", "max", "lasttoken")
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
FIX = "serve a model of transformer, pooling and normalize modules"


@dataclass(frozen=True)
class Head:
    """What is made of the encoder's outputs. context: tokens of a text, where the folder says."""

    pooling: str
    normalize: bool
    context: int | None

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, T, D], mask [B, T] (1: a token of the text, padding at the right) -> [B, D]."""
        hidden, kept = hidden.float(), mask[..., None].to(hidden.device)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "lasttoken":
            last = kept.sum(1) - 1
            pooled = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[2]))[:, 0]
        elif self.pooling == "max":
            pooled = hidden.masked_fill(kept == 0, float("-inf")).amax(1)
        else:
            pooled = (hidden * kept).sum(1) / kept.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


class EmbeddingEngine:
    """An encoder of transformers that makes a vector of each text."""

    def __init__(self, folder: str | Path, *, name: str | None = None, settings: Settings | None = None):
        self._folder = str(folder)
        self._name = name or Path(self._folder).name
        self._settings = settings or Settings()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="whet-embedding")
        self._outstanding = 0
        self._running = False

    async def start(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)
        self._running = True

    async def stop(self) -> None:
        self._running = False
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    def models(self) -> Many[ServedModel]:
        return [ServedModel(self._name, self._context, kind="embedding")]

    async def generate(self, request: Request) -> AsyncIterator[Piece]:
        raise Refused(f"{request.model} makes embeddings, not text", "model")
        yield  # what makes this a generator

    async def embed(self, model: str, texts: Many[str | Many[int]]) -> Embedded:
        if model != self._name:
            raise UnknownModel(f"no model {model!r} is served here", "model")
        if not self._running:
            raise EngineDown("the engine is not running")
        if self._outstanding >= self._settings.max_running + self._settings.max_waiting:
            raise Busy()
        self._outstanding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, list(texts))
        finally:
            self._outstanding -= 1

    def load(self) -> dict[str, float]:
        return {"running": float(self._outstanding > 0), "waiting": float(max(0, self._outstanding - 1))}

    # ------------------------------------------------------------ the thread's own

    def _load(self) -> None:
        from transformers import AutoModel

        self._head = read_head(Path(self._folder))
        self._model, self._tokenizer = load(
            self._folder,
            precision="16bit",
            dtype=self._settings.dtype,
            auto_model=AutoModel,
            attn_implementation="sdpa",
            device_map=self._settings.device_map,
        )
        self._model.train(False)
        config: Any = self._model.config
        limits = [self._head.context, self._settings.context, getattr(config, "max_position_embeddings", None)]
        self._context = min(limit for limit in limits if limit)

    @torch.inference_mode()
    def _embed(self, texts: list[str | Many[int]]) -> Embedded:
        rows = [self._tokens(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        vectors: list[list[float]] = [[] for _ in rows]
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            for i, vector in zip(chosen, self._batch([rows[i] for i in chosen]), strict=True):
                vectors[i] = vector
        return Embedded(vectors, sum(map(len, rows)))

    def _tokens(self, text: str | Many[int]) -> list[int]:
        if isinstance(text, str):
            tokens = list(self._tokenizer(text)["input_ids"])
        else:
            tokens = check_ids(text, self._model.config.vocab_size, "input")
        if not tokens or not text:
            raise Refused("a text is empty", "input")
        if len(tokens) > self._context:
            raise Refused(f"a text has {len(tokens)} tokens, and the model reads {self._context}", "input")
        return tokens

    def _batch(self, rows: list[list[int]]) -> list[list[float]]:
        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = self._model.device
        hidden = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        vectors: list[list[float]] = self._head(hidden, mask).tolist()
        return vectors


def read_head(folder: Path) -> Head:
    """What the folder's modules.json says. Raises WhetError for modules that are not known here."""
    modules = _json(folder / "modules.json")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise WhetError(f"its modules are {', '.join(kinds)}", where=str(folder / "modules.json"), fix=FIX)
    if modules[0].get("path"):
        raise WhetError("its encoder lies in a folder of its own", where=str(folder / "modules.json"), fix=FIX)
    settings = folder / "sentence_bert_config.json"
    context = _json(settings).get("max_seq_length") if settings.is_file() else None
    pooling = _pooling(_json(folder / modules[1]["path"] / "config.json"), folder)
    return Head(pooling, len(kinds) == 3, context)


def _pooling(config: dict[str, Any], folder: Path) -> str:
    """One field of that name, or (older folders) one switch a kind."""
    asked = [str(config["pooling_mode"])] if "pooling_mode" in config else []
    asked += [SWITCHES.get(key, key) for key, on in config.items() if on is True and key.startswith("pooling_mode_")]
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise WhetError(f"its pooling is {' and '.join(asked) or 'not said'}", where=str(folder), fix=FIX)
    return asked[0]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WhetError(f"it can't be read: {error}", where=str(path), fix="copy the model's folder again") from None
