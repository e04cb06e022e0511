"""A merged model's folder, as transformers loads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedTokenizerBase,
)

from whet.errors import WhetError
from whet.export import compressed, merge_nf4
from whet.export.json_files import read_json
from whet.export.merge_formats import FLOATS
from whet.export.merge_layout import Layout, layout_of
from whet.export.merge_stream import without_quantization
from whet.export.proof.behaviour import Answer
from whet.export.proof.checks import Check
from whet.export.proof.identity import ends_check, sizes_check, template_check, tokenizer_checks
from whet.export.proof.reference import Asked, LogProbs, Reference, evaluating, greedy, log_probs
from whet.export.proof.share import wide

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
QUANTIZED = {"nf4": "nf4", **compressed.FORMATS}
"""Format -> what `quantization_config` calls it."""

VOLATILE = {
    "_name_or_path",
    "architectures",  # a model in memory may be of a class of its own
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of a config that say how a model is held, not what it computes."""

INDEX = "model.safetensors.index.json"


class MergedFolder:
    """The artifact `folder`, of a format of `--merged`. Nothing is read before it is asked for."""

    def __init__(self, folder: Path, format: str, reference: Reference):
        self.path, self.format, self.reference = folder, format, reference
        self.engine = f"transformers {transformers.__version__}"

    def static_checks(self) -> list[Check]:
        """Files, types, config, sizes, tokenizer: all that can be told without running it."""
        files = self._files_check()
        if not files.passed:
            return [files]
        try:
            return [files, self._types_check(), self._head_check(), *self._identity_checks()]
        except (OSError, ValueError, KeyError) as error:
            return [files, Check("readable", False, f"transformers can't read it: {_first_line(error)}")]

    def _identity_checks(self) -> list[Check]:
        config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        text = config.get_text_config()
        head = self._rows("lm_head.weight") if not text.tie_word_embeddings else text.vocab_size
        return [
            self._config_check(config),
            sizes_check(self.reference, text.vocab_size, head),
            *tokenizer_checks(self.reference, self.tokenizer),
            template_check(self.reference, self.tokenizer.chat_template),
        ]

    def engine_checks(self) -> list[Check]:
        """That transformers finds every weight it wants; and where an answer ends."""
        try:
            model, found = self._loaded
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            return [Check("loads", False, f"transformers refuses it: {_first_line(error)}")]
        wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
        told = "; ".join(f"{kind}: {len(names)}, {names[0]} first" for kind, names in wrong.items())
        loads = Check("loads", not wrong, told or "transformers finds every weight, and no other")
        return [loads, ends_check(self.reference, model, self.tokenizer)]

    # ---------------------------------------------------------------- what it says

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def log_probs(self, asked: Sequence[Asked]) -> list[LogProbs]:
        with evaluating(self.model):
            return [log_probs(self.model, one.ids, len(one.log_probs)) for one in asked]

    def answers(self, asked: Sequence[Asked]) -> list[Answer]:
        with evaluating(self.model):
            return [Answer(*greedy(self.model, one.prompt, self.reference.ends)) for one in asked]

    def layer(self, name: str, x: Tensor) -> Tensor:
        """The outputs of the layer `name` for inputs x."""
        with torch.no_grad():
            out: Tensor = wide(self.model.get_submodule(name))(x.to(self.model.device))
        return out

    def rounded(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a layer's weights as the format holds them."""
        dtype = FLOATS.get(self.format, self.reference.model.dtype)
        if self.format in FLOATS or name not in self._layout.linear:
            return rows.to(dtype).float()
        if self.format == "nf4":
            held = merge_nf4.quantize(tuple(rows.shape), lambda start, stop: rows[start:stop], dtype)
            return held.rows(0, len(rows)).float()
        return self._compressed.decoded(name, rows)

    @cached_property
    def _compressed(self) -> compressed.Compressed:
        return compressed.compressed(self.format, self._layout, self.reference.model.dtype)

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(without_quantization(self.reference.model.config))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> tuple[Any, dict[str, Any]]:
        """The model and what transformers says of its weights. It computes in what the reference computes in, so that
        only the weights' rounding differs; of compressed-tensors it sees the dequantized ones."""
        plain = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.path,
            dtype=self.reference.model.dtype,
            device_map={"": self._device()},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **(plain if self.format in compressed.FORMATS else {}),
        )
        model, found = loaded
        return model, {kind: names for kind, names in found.items() if kind.endswith("keys")}

    def _device(self) -> str | int:
        """The GPU, where it has room for this model beside the reference."""
        if not torch.cuda.is_available():
            return "cpu"
        needed = sum(path.stat().st_size for path in self._shards()) * 1.25
        return 0 if torch.cuda.mem_get_info()[0] > needed else "cpu"

    # ---------------------------------------------------------------- its files

    def _shards(self) -> list[Path]:
        if (self.path / INDEX).is_file():
            return [self.path / name for name in sorted(set(read_json(self.path / INDEX)["weight_map"].values()))]
        return [self.path / "model.safetensors"]

    def _files_check(self) -> Check:
        """Every shard is there and whole: a safetensors header says where the file must end."""
        names: list[str] = []
        try:
            shards = self._shards()
            for shard in shards:
                with safe_open(shard, framework="pt") as file:
                    names += file.keys()
        except (SafetensorError, OSError, WhetError, KeyError) as error:
            return Check("files", False, f"a file is missing or cut short: {_first_line(error)}")
        if (self.path / INDEX).is_file():
            lost = sorted(set(read_json(self.path / INDEX)["weight_map"]) - set(names))
            if lost:
                return Check("files", False, f"{len(lost)} tensors of the index are in no file, {lost[0]} first")
        return Check("files", True, f"{len(names)} tensors in {len(shards)} whole files")

    def _types_check(self) -> Check:
        """The weights are of the format's type, or quantized in its way."""
        if self.format in DTYPES:
            found = {kind for kind, _ in self._tensors().values()}
            told = ", ".join(sorted(found))
            passed = found == {DTYPES[self.format]}
            return Check("types", passed, f"its weights are {told}" + f", not {DTYPES[self.format]}" * (not passed))
        config = read_json(self.path / "config.json").get("quantization_config") or {}
        kind = config.get("bnb_4bit_quant_type") or config.get("format")
        passed = kind == QUANTIZED.get(self.format)
        return Check("types", passed, f"the config says {kind or 'that nothing is quantized'}, for {self.format}")

    def _head_check(self) -> Check:
        """A tied head is the embedding itself: a second one beside it would be ignored, or taken in its place."""
        tied = bool(read_json(self.path / "config.json").get("tie_word_embeddings"))
        expected, beside = head_is_tied(self.reference.model), "lm_head.weight" in self._tensors()
        words = {True: "tied to the embedding", False: "a weight of its own"}
        if tied == expected and beside != tied:
            return Check("head", True, f"the head is {words[expected]}")
        found = f"the config says {words[tied]}, and there is {'one' if beside else 'none'} in the files"
        return Check("head", False, f"the head should be {words[expected]}; {found}")

    def _config_check(self, config: Any) -> Check:
        expected = self.reference.model.config.to_dict()
        found = config.to_dict()
        untied = set() if head_is_tied(self.reference.model) else {"tie_word_embeddings"}
        keys = sorted((expected.keys() | found.keys()) - VOLATILE - untied)
        other = [key for key in keys if _plain(expected.get(key)) != _plain(found.get(key))]
        what = f"{', '.join(other)} differ" if other else "the config is the tuned model's"
        return Check("config", not other, what)

    def _rows(self, name: str) -> int:
        return self._tensors().get(name, ("", [0]))[1][0]

    def _tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name -> type and shape, of every tensor in the files."""
        found = {}
        for shard in self._shards():
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                    part = file.get_slice(name)
                    found[name] = (part.get_dtype(), part.get_shape())
        return found


def head_is_tied(model: Any) -> bool:
    """Whether the head's weight is the embedding's. Training may have given a tied head values of its own."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not plain.config.get_text_config().tie_word_embeddings:
        return False
    both = (plain.get_input_embeddings(), plain.get_output_embeddings())
    changed = [isinstance(module, LoraLayer | ModulesToSaveWrapper) for module in both]
    if not any(changed):
        return True
    weights = [_active(module).weight for module in both]
    return weights[0].data_ptr() == weights[1].data_ptr() and not any(isinstance(module, LoraLayer) for module in both)


def _active(module: Any) -> Any:
    """The module that computes: of one that was trained whole, the trained copy."""
    return module.modules_to_save[module.active_adapters[0]] if isinstance(module, ModulesToSaveWrapper) else module


def _plain(value: Any) -> Any:
    """A config's value as JSON would give it back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
