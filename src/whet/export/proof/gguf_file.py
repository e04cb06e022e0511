"""A GGUF file, as llama.cpp runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor
from torch.nn.functional import embedding, linear

from whet.errors import WhetError
from whet.export import llama_cpp
from whet.export.gguf import verify
from whet.export.gguf_architectures import Architecture, SourceTensor, architecture_of
from whet.export.gguf_checkpoint import Checkpoint
from whet.export.gguf_plan import checked_tensors, plan_file
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.gguf_tokenizer.carried import KEY as CARRIED
from whet.export.gguf_tokenizer.carried import Carried
from whet.export.gguf_tokenizer.llama_cpp_cut import llama_cpp_cut
from whet.export.proof.behaviour import Answer, texts_to_tokenize
from whet.export.proof.checks import Check
from whet.export.proof.identity import SPECIAL, added_check, same_ends, sizes_check, template_check
from whet.export.proof.reference import ANSWER, Asked, LogProbs, Reference
from whet.quant.gguf_mixes import MIXES
from whet.quant.gguf_types import TYPES

TEMPLATE = "tokenizer.chat_template"
NAMES = {"unk": "unknown", "pad": "padding"}
"""GGUF's names of special tokens, where they are not transformers'."""

OWN_TOKENS = "llama.cpp's tokens"
ENDS = ("eos", "eot", "eom")
TIMEOUT = 3600
"""Seconds that llama.cpp may take for all prompts: on a CPU, tens of tokens a second at 8B."""


class GGUFFile:
    """The artifact `path`, of a GGUF quantization, written from the folder `made_from`, with an imatrix or without."""

    engine = f"llama.cpp (node-llama-cpp {llama_cpp.VERSION})"

    def __init__(
        self,
        path: Path,
        format: str,
        reference: Reference,
        made_from: Path,
        *,
        imatrix: bool = False,
        threads: int | None = None,
    ):
        self.path, self.format, self.reference, self.made_from = path, format, reference, made_from
        self.imatrix, self.threads = imatrix, threads

    def static_checks(self) -> list[Check]:
        """File, types, metadata, sizes, tokenizer, tensors: all that can be told without running it."""
        file = whole_check(self.path, lambda: self._reader)
        if not file.passed:
            return [file]
        return [
            file,
            self._types_check(),
            self._metadata_check(),
            sizes_check(self.reference, self._rows("token_embd.weight"), self._rows(self._head)),
            self._vocabulary_check(),
            added_check(*self._added()),
            same_ends(self.reference, self._ends()),
            self._special_check(),
            template_check(self.reference, self._template()),
            self._tensors_check(),
        ]

    def engine_checks(self) -> list[Check]:
        """llama.cpp's own tokenizer, where `tokenize` goes by the one that the file carries.

        What else llama.cpp says is compared later; a file that it can't load is found when it is asked.
        """
        return [self._own_tokens_check()] if self._carried else []

    # ---------------------------------------------------------------- what it says

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self._carried.cut(texts) if self._carried else self._said.tokens

    def log_probs(self, asked: Sequence[Asked]) -> list[LogProbs]:
        return [llama_cpp.log_softmax(rows) for rows in self._said.logits]

    def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        return [Answer(one.token_ids, one.stopped) for one in self._said.generations]

    @cached_property
    def _said(self) -> llama_cpp.Said:
        """All that llama.cpp is asked, at once: the file is loaded by one process."""
        asked = self.reference.asked
        return llama_cpp.ask(
            self.path,
            texts=texts_to_tokenize(self.reference),
            readings=[llama_cpp.Reading(self.path, one.ids, one.start) for one in asked],
            prompts=[one.prompt for one in asked],
            max_new_tokens=ANSWER,
            threads=self.threads,
            timeout=TIMEOUT,
        )

    def layer(self, name: str, x: Tensor) -> Tensor:
        """The outputs of the layer that transformers calls `name`, in its order of rows, for inputs x."""
        weight = self._weight(f"{name}.weight")
        if not x.is_floating_point():
            return embedding(x, weight)
        bias = self._weight(f"{name}.bias") if f"{name}.bias" in self._sources else None
        return linear(x.float(), weight, bias)

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a layer's weights in the type that the file holds them in, by way of the merge's type."""
        tensor = self._source(f"{name}.weight")
        kind = TYPES[self._written[tensor.name].tensor_type.name.lower()]
        merged = rows.to(self._checkpoint.read(tensor.source, slice(0, 1)).dtype).float()
        return torch.from_numpy(kind.decode(kind.encode(merged.numpy())))

    def _weight(self, source: str) -> Tensor:
        """A tensor decoded by the gguf package, which is not what encoded it; rows in transformers' order."""
        tensor = self._source(source)
        written = self._written[tensor.name]
        x = dequantize(written.data, written.tensor_type).reshape(tensor.shape)
        order = tensor.convert(np.arange(len(x), dtype=np.float32)) - np.float32(tensor.offset)
        return torch.from_numpy(np.ascontiguousarray(x[np.argsort(order)] - np.float32(tensor.offset)))

    # ---------------------------------------------------------------- its parts

    @cached_property
    def _reader(self) -> Any:
        return gguf.GGUFReader(self.path)

    @cached_property
    def _written(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.made_from)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.made_from)

    @cached_property
    def _sources(self) -> dict[str, SourceTensor]:
        """The tensors that the file should hold, by their names in the folder it was made from."""
        tensors = checked_tensors(self._architecture, self._checkpoint)
        return {tensor.source: tensor for tensor in tensors}

    def _source(self, name: str) -> SourceTensor:
        """What stands for the tensor that transformers calls `name`: the embedding, for a head that is tied to it."""
        return self._sources[name if name in self._sources else self._architecture.embedding]

    @property
    def _head(self) -> str:
        """The tensor that is the head: the embedding, where there is no other."""
        return "output.weight" if "output.weight" in self._written else "token_embd.weight"

    def _rows(self, name: str) -> int:
        return int(self._written[name].shape[-1]) if name in self._written else 0

    def _value(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    @cached_property
    def _carried(self) -> Carried | None:
        content = self._value(CARRIED)
        return Carried(content, self._rows("token_embd.weight"), str(self.path)) if content else None

    # ---------------------------------------------------------------- checks

    def _own_tokens_check(self) -> Check:
        """llama.cpp's own tokenizer does with each text what whet's notes are about, and nothing else."""
        texts = texts_to_tokenize(self.reference)
        told = llama_cpp_cut(read_tokenizer(self.made_from, self._rows("token_embd.weight")), texts)
        found = self._said.tokens
        if wrong := sum(one != other for one, other in zip(found, told, strict=True)):
            return Check(OWN_TOKENS, False, f"{wrong} of {len(texts)} texts become tokens that no note tells of")
        other = [one != own for one, own in zip(found, self.tokenize(texts), strict=True)]
        prompts = sum(other[: len(self.reference.texts)])
        what = (
            f"{prompts} of {len(self.reference.texts)} prompts and {sum(other) - prompts} other texts become other "
            "tokens where a server leaves it to llama.cpp, as the notes say; whet serve does not"
        )
        return Check(OWN_TOKENS, True, what)

    def _types_check(self) -> Check:
        """The file's type, and each tensor's, are those that the quantization asks for."""
        plan = plan_file(self.path, self.format, self._architecture, list(self._sources.values()), self.imatrix)
        expected = {tensor.name: kind.ggml for tensor, kind in zip(plan.tensors, plan.types, strict=True)}
        other = [
            name for name, kind in expected.items() if name in self._written and self._written[name].tensor_type != kind
        ]
        if other:
            name = other[0]
            told = f"{name} is {self._written[name].tensor_type.name}, not {expected[name].name}"
            return Check("types", False, f"{len(other)} tensors have other types than {self.format} gives them: {told}")
        file_type = self._value("general.file_type")
        passed = file_type == MIXES[self.format].file_type
        what = f"{len(expected)} tensors have the types of {self.format}"
        return Check("types", passed, what if passed else f"the file says its type is {file_type}, not {self.format}")

    def _metadata_check(self) -> Check:
        """The architecture's keys, as the model's config implies them: rope base, heads, norm's epsilon, windows."""
        writer = gguf.GGUFWriter(None, self._architecture.gguf_name)
        self._architecture.add_metadata(writer)
        expected = {key: value.value for key, value in writer.kv_data[0].items()}
        other = [key for key, value in expected.items() if not _same(self._value(key), value)]
        extra = [
            key
            for key in self._reader.fields
            if key.startswith(f"{self._architecture.gguf_name}.") and key not in expected
        ]
        wrong = sorted([*other, *extra])
        what = f"{', '.join(wrong)} not as the model's config implies" if wrong else f"{len(expected)} keys are right"
        return Check("metadata", not wrong, what)

    def _vocabulary_check(self) -> Check:
        """Each token of the tokenizer is there under its id."""
        tokens = self._value("tokenizer.ggml.tokens") or []
        expected = {index: text for text, index in self.reference.tokenizer.get_vocab().items()}
        other = [i for i, text in expected.items() if i >= len(tokens) or not _same_token(tokens[i], text)]
        if other:
            first = min(other)
            return Check("vocabulary", False, f"{len(other)} tokens are other ones, {expected[first]!r} first")
        return Check("vocabulary", True, f"{len(expected):,} tokens have their ids")

    def _added(self) -> tuple[dict[int, Any], dict[int, Any]]:
        """Added tokens by id, as the tokenizer has them and as the file has them: text, and whether it is special."""
        tokens = self._value("tokenizer.ggml.tokens") or []
        types = self._value("tokenizer.ggml.token_type") or []
        # llama.cpp makes runs of blanks, "▁▁", by merging; as added tokens it would write them out as "▁▁".
        added = self.reference.tokenizer.added_tokens_decoder
        known = {index: token for index, token in added.items() if "▁" not in token.content}
        special = {gguf.TokenType.CONTROL: True, gguf.TokenType.UNKNOWN: True, gguf.TokenType.USER_DEFINED: False}
        found = {
            index: (
                known[index].content if _same_token(tokens[index], known[index].content) else tokens[index],
                special[gguf.TokenType(types[index])],
            )
            for index in known
            if index < min(len(tokens), len(types)) and gguf.TokenType(types[index]) in special
        }
        return {index: (token.content, token.special) for index, token in known.items()}, found

    def _ends(self) -> frozenset[int]:
        found = (self._value(f"tokenizer.ggml.{name}_token_id") for name in ENDS)
        return frozenset(index for index in found if index is not None)

    def _special_check(self) -> Check:
        """Special tokens have the ids that the tokenizer gives them."""
        tokenizer = self.reference.tokenizer
        expected = {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
        found = {name: self._value(f"tokenizer.ggml.{NAMES.get(name, name)}_token_id") for name in SPECIAL}
        other = [name for name in SPECIAL if expected[name] is not None and expected[name] != found[name]]
        what = f"{', '.join(other)} other than the tokenizer's" if other else "special tokens have their ids"
        return Check("special tokens", not other, what)

    def _template(self) -> str | dict[str, str] | None:
        """The chat template, or the named ones with the default among them."""
        names = self._value("tokenizer.chat_templates") or []
        default: str | None = self._value(TEMPLATE)
        if not names:
            return default
        named = {name: self._value(f"{TEMPLATE}.{name}") for name in names}
        return named if default is None else {"default": default, **named}

    def _tensors_check(self) -> Check:
        """Every tensor decodes to within its type's error bound of the folder that it was made from."""
        try:
            verify(self.path, self.made_from)
        except WhetError as error:
            return Check("tensors", False, error.what)
        return Check("tensors", True, f"{len(self._written)} tensors decode to what they were made from")


def whole_check(path: Path, read: Callable[[], Any]) -> Check:
    """The file parses, by `read`, and ends where its last tensor does."""
    try:
        tensors = read().tensors
        ends = max(int(tensor.data_offset) + int(tensor.n_bytes) for tensor in tensors)
    except (OSError, ValueError, KeyError, IndexError) as error:
        return Check("file", False, f"it is damaged or cut short: {error}")
    size = path.stat().st_size
    padded = -(-ends // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
    passed = ends <= size <= padded
    told = f"{len(tensors)} tensors in {size:,} bytes"
    return Check("file", passed, told if passed else f"{told}, and they end at byte {ends:,}")


def _same(found: Any, expected: Any) -> bool:
    """Whether a value of the file is the expected one; floats as fp32 holds them."""
    if isinstance(expected, float):
        return isinstance(found, float) and bool(np.float32(found) == np.float32(expected))
    return bool(found == (list(expected) if isinstance(expected, tuple) else expected))


def _same_token(found: str, expected: str) -> bool:
    """Whether two spellings name one token: SentencePiece's mark stands for a space in added tokens."""
    return found == expected or found.replace("▁", " ") == expected.replace("▁", " ")
