"""A GGUF adapter, as llama.cpp puts it on its base.

The base that it is asked on is a GGUF file made for the proof alone, so that nothing stands between the adapter in
llama.cpp and the adapter that was trained: no merge, and no rounding but that of what the model computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import embedding, linear

from whet.export import llama_cpp
from whet.export.gguf_architectures import Architecture, SourceTensor, architecture_of
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.gguf_tokenizer.carried import Carried
from whet.export.llama_cpp import Reading
from whet.export.proof.behaviour import Answer, texts_to_tokenize
from whet.export.proof.checks import Check
from whet.export.proof.gguf_file import TIMEOUT, GGUFFile, whole_check
from whet.export.proof.reference import Asked, LogProbs, Reference
from whet.export.proof.share import wide

SIDES = ("a", "b")


class AdapterFile:
    """The artifact `path`, fp32. base: a GGUF file of the base, written from base_folder."""

    engine = GGUFFile.engine
    format = "f32"

    def __init__(self, path: Path, reference: Reference, base: Path, base_folder: Path, *, threads: int | None = None):
        self.path, self.reference, self.base, self.base_folder = path, reference, base, base_folder
        self.threads = threads

    def static_checks(self) -> list[Check]:
        """File, metadata, and that each adapted layer has both its halves: all that can be told without running it."""
        file = whole_check(self.path, lambda: self._reader)
        if not file.passed:
            return [file]
        return [file, self._metadata_check(), self._layers_check()]

    def engine_checks(self) -> list[Check]:
        return []

    # ---------------------------------------------------------------- what it says

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        carried = read_tokenizer(self.base_folder, self._architecture.config.vocab).carried
        if carried is None:
            return self._said.tokens
        return Carried(carried, self._architecture.config.vocab, str(self.base)).cut(texts)

    def log_probs(self, asked: Sequence[Asked]) -> list[LogProbs]:
        return self._rows

    def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        """Greedy answers as far as they can be told: up to where they part from the reference's.

        The rows after the prompt and after each token of the reference's answer say what would have come next there.
        """
        return [followed(one, found, self.reference.ends) for one, found in zip(asked, self._rows, strict=True)]

    @cached_property
    def _said(self) -> llama_cpp.Said:
        readings = [Reading(self.base, one.ids, one.start, self.path) for one in self.reference.asked]
        texts = texts_to_tokenize(self.reference)
        return llama_cpp.ask(self.base, texts=texts, readings=readings, threads=self.threads, timeout=TIMEOUT)

    @cached_property
    def _rows(self) -> list[LogProbs]:
        return [llama_cpp.log_softmax(rows) for rows in self._said.logits]

    def layer(self, name: str, x: Tensor) -> Tensor:
        """The outputs of the layer `name` with the file's adapter on it, in transformers' order of rows."""
        module = self._adapted[name]
        target = self._targets[name]
        a, b = (torch.from_numpy(np.array(self._halves[f"{target.name}.lora_{side}"])) for side in SIDES)
        base = wide(module.get_base_layer())
        with torch.no_grad():
            before: Tensor = base(x.to(next(base.parameters()).device)).cpu()
        if x.is_floating_point():
            order = target.convert(np.arange(len(b), dtype=np.float32)).argsort()
            change = linear(linear(x.float(), a), b[torch.from_numpy(order)])
        else:
            change = linear(embedding(x, a), b)
        scale = float(self._value(gguf.Keys.Adapter.LORA_ALPHA)) / b.shape[1]
        return before + scale * change

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        """The adapter is not added to weights, so nothing of it is rounded away."""
        return rows

    # ---------------------------------------------------------------- its parts

    @cached_property
    def _reader(self) -> Any:
        return gguf.GGUFReader(self.path)

    @cached_property
    def _halves(self) -> dict[str, NDArray[np.float32]]:
        return {tensor.name: tensor.data for tensor in self._reader.tensors}

    @cached_property
    def _adapted(self) -> dict[str, Any]:
        """Layer -> module, of every layer of the reference that has an adapter."""
        plain = self.reference.model.get_base_model()
        return {name: module for name, module in plain.named_modules() if isinstance(module, LoraLayer)}

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.base_folder)

    @cached_property
    def _targets(self) -> dict[str, SourceTensor]:
        return {tensor.source.removesuffix(".weight"): tensor for tensor in self._architecture.expected_tensors()}

    def _value(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _metadata_check(self) -> Check:
        """It says that it is a LoRA, and for which architecture."""
        expected = {
            gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
            gguf.Keys.General.ARCHITECTURE: self._architecture.gguf_name,
            gguf.Keys.Adapter.TYPE: "lora",
        }
        other = [key for key, value in expected.items() if self._value(key) != value]
        if not self._value(gguf.Keys.Adapter.LORA_ALPHA):
            other.append(gguf.Keys.Adapter.LORA_ALPHA)
        what = f"{', '.join(other)} not as the adapter's" if other else f"a LoRA for {self._architecture.gguf_name}"
        return Check("metadata", not other, what)

    def _layers_check(self) -> Check:
        """Both halves of each layer's adapter are there, of the right shapes, and no others."""
        expected = {
            f"{self._targets[name].name}.lora_{side}": shape
            for name, module in self._adapted.items()
            for side, shape in zip(SIDES, _shapes(module), strict=True)
        }
        found = {name: tuple(half.shape) for name, half in self._halves.items()}
        other = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if other:
            return Check("layers", False, f"{len(other)} halves are missing, other ones or too many, {other[0]} first")
        return Check("layers", True, f"{len(self._adapted)} layers have both halves")


def _shapes(module: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B in the file; A of an embedding lies the other way round."""
    (adapter,) = module.active_adapters
    if adapter in module.lora_embedding_A:
        a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return (a.shape[1], a.shape[0]), tuple(b.shape)
    return tuple(module.lora_A[adapter].weight.shape), tuple(module.lora_B[adapter].weight.shape)


def followed(asked: Asked, rows: LogProbs, ends: frozenset[int]) -> Answer:
    """The greedy answer that these distributions give along the reference's, up to the first token that is another."""
    first, answer = len(asked.prompt) - 1 - asked.start, asked.answer
    for i, row in enumerate(rows[first : first + len(answer) + asked.stopped]):
        token = int(row.argmax())
        if token in ends:
            return Answer(answer[:i], stopped=True)
        if i == len(answer) or token != answer[i]:
            return Answer([*answer[:i], token], stopped=False)
    return Answer(answer, stopped=False)
