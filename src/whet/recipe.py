"""The recipe: one YAML file that says everything about a run.

`load` reads it into frozen models and reports every fault at once, each with its line and what to type instead. A
field's description below is its documentation, its help in an editor (`whet schema`) and its row in docs/recipe.md.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from whet.errors import WhetError, WhetErrors
from whet.recipe_faults import Document, explain, read_yaml
from whet.units import parse_memory

Format = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m"]


class Part(BaseModel):
    """A section of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Part):
    base: str = Field(description="Local folder, relative to the recipe; hub name; or `builtin:tiny`.")
    load: Literal["nf4", "int8", "16bit", "32bit"] = Field("nf4", description="How the frozen base is held in memory.")
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="What to compute in. Default: bfloat16 where the GPU has it, float32 on a CPU."
    )
    compute: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="How training multiplies by the base: `bf16`, in `dtype`; `fp8`, in 8-bit floating point, for an "
        "nf4 base on NVIDIA's Hopper or later. Evaluation and export do not use it.",
    )
    max_seq_length: int = Field(
        2048, ge=8, description="Longest training row, in tokens. Longer ones are truncated and counted."
    )
    template: str | None = Field(None, description="Named chat template, in place of the tokenizer's own.")


class Adapter(Part):
    r: int = Field(16, ge=1, description="Rank of the LoRA adapter.")
    alpha: float = Field(16.0, gt=0, description="Scale: the adapter's output is multiplied by alpha / r.")
    targets: str | list[str] = Field("all-linear", description="Names of the layers to adapt, or `all-linear`.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")
    dora: bool = Field(False, description="Train magnitudes beside directions (DoRA).")


class Source(Part):
    path: str = Field(
        pattern=r"^[^\x00]+$",
        description="File or glob, relative to the recipe: .jsonl, .parquet, .csv, .tsv, .txt, .md.",
    )
    format: Format = Field("auto", description="Shape of a row; `auto` looks at the first one.")
    columns: dict[str, str] = Field(default_factory=dict, description="Names the format expects -> names the file has.")

    def files(self, base: Path) -> list[Path]:
        """The files that match, sorted; `path` starts at `base`. A name that exists is meant literally."""
        pattern = os.path.join(base, os.path.expanduser(self.path))
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        return sorted(Path(name) for name in found if os.path.isfile(name))


class Split(Part):
    eval: float = Field(
        0.1, gt=0, lt=1, description="Share of the rows held out for evaluation, chosen by a keyed hash."
    )
    group_by: str | None = Field(None, description="Column whose equal values stay on one side (customer, document).")


class Data(Part):
    sources: list[Source] = Field(min_length=1, description="Where the training rows come from.")
    eval_sources: list[Source] = Field(
        default_factory=list, description="Held-out rows, when they are files of their own."
    )
    split: Split | None = Field(
        None, description="Hold out a share of `sources`. Default: a tenth, unless eval_sources are given."
    )
    train_on: Literal["responses", "last", "all"] = Field(
        "responses", description="Tokens that carry loss: every assistant turn, the last one, or everything."
    )


class Train(Part):
    method: Literal["sft", "dpo"] = Field(
        "sft", description="Supervised fine-tuning, or direct preference optimization."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps.")
    learning_rate: float = Field(2.0e-4, gt=0, lt=1, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Learning rate after the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the rate rises from 0.")
    tokens_per_step: int = Field(16384, ge=1, description="Tokens of an optimizer step: max_seq_length times rows.")
    micro_batch: int = Field(1, ge=1, description="Rows sent through the model at a time.")
    packing: bool = Field(True, description="Several documents to a row, without padding; none sees another.")
    optimizer: Literal["adamw_torch", "adamw_8bit"] = Field(
        "adamw_torch", description="AdamW with fp32 or 8-bit states."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    beta: float = Field(0.1, gt=0, description="DPO: strength of the pull towards the base model.")
    checkpoint_every: int = Field(50, ge=1, description="Optimizer steps between checkpoints; the last two are kept.")


class Budget(Part):
    gpu_memory: str | None = Field(
        None, description='What training may take on the GPU, e.g. "24GiB". Default: all that is free.'
    )

    @field_validator("gpu_memory", mode="after")
    @classmethod
    def _an_amount(cls, amount: str | None) -> str | None:
        if amount is not None:
            parse_memory(amount)
        return amount


class Eval(Part):
    exact_match: bool = Field(
        True, description="Generate an answer for each held-out row and compare it with the reference."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer, in tokens.")
    limit: int | None = Field(200, ge=1, description="Held-out rows to generate for; null for all. The loss uses all.")
    batch: int = Field(16, ge=1, description="Rows generated for at a time.")


class Export(Part):
    merged: Literal["bf16", "fp16", "fp32", "nf4"] | None = Field(
        None, description="Write the model with its adapter merged in."
    )
    gguf: list[GGUFType] = Field(default_factory=list, description="GGUF files to write, by type.")
    base: Literal["dequantized", "original"] = Field(
        "dequantized", description="What the adapter is added to: the base as training saw it, or its 16-bit original."
    )


class Recipe(Part):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run, of letters, digits, and . _ -; its folder starts with it.",
    )
    seed: int = Field(3407, ge=0, lt=2**32, description="Seeds the adapter, the order of the rows and dropout.")
    model: Model = Field(description="What to start from.")
    adapter: Adapter | None = Field(default_factory=Adapter, description="LoRA adapter; null trains every weight.")
    data: Data = Field(description="What to learn from.")
    train: Train = Field(default_factory=Train, description="How to learn.")
    budget: Budget = Field(default_factory=Budget, description="What training may take.")
    eval: Eval | None = Field(default_factory=Eval, description="Base against tuned on held-out rows; null for none.")
    export: Export = Field(default_factory=Export, description="What to write besides the adapter.")

    @field_validator("adapter", mode="after")
    @classmethod
    def _targets_named(cls, adapter: Adapter | None) -> Adapter | None:
        if adapter is not None and not adapter.targets:
            raise ValueError("targets is empty; use all-linear")
        return adapter

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.adapter is None and self.model.load in ("nf4", "int8"):
            raise ValueError(
                f"every weight is trained (adapter: null) but model.load is {self.model.load}; use load: 16bit"
            )
        if self.model.compute == "fp8":
            self._fp8_can_be_had()
        if self.train.tokens_per_step < self.model.max_seq_length * self.train.micro_batch:
            need = self.model.max_seq_length * self.train.micro_batch
            raise ValueError(
                f"train.tokens_per_step is {self.train.tokens_per_step}, less than one micro-batch of max_seq_length "
                f"times micro_batch; use tokens_per_step: {need}"
            )
        if self.data.split is not None and self.data.eval_sources:
            raise ValueError("data.split and data.eval_sources both hold rows out; keep one of them")
        return self

    def _fp8_can_be_had(self) -> None:
        """Raise ValueError for what FP8 is not for. Whether the machine has it is asked when a run starts."""
        if self.adapter is None:
            raise ValueError("model.compute is fp8 but every weight is trained (adapter: null); use compute: bf16")
        if self.model.load != "nf4":
            raise ValueError(
                f"model.compute is fp8, which an nf4 base can have, but model.load is {self.model.load}; use load: nf4"
            )
        if self.model.dtype not in (None, "bfloat16"):
            raise ValueError(f"model.compute is fp8 but model.dtype is {self.model.dtype}; use dtype: bfloat16")
        if self.adapter.dropout or self.adapter.dora:
            name = "dora" if self.adapter.dora else "dropout"
            raise ValueError(
                f"model.compute is fp8, which layers with adapter.{name} can't have; "
                f"leave {name} out, or use compute: bf16"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows of max_seq_length tokens in an optimizer step, a multiple of micro_batch."""
        rows = self.train.tokens_per_step // self.model.max_seq_length
        return rows // self.train.micro_batch * self.train.micro_batch

    def digest(self) -> str:
        """Hex digest of everything the recipe says, defaults included."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Recipe:
    """Read and check a recipe. Raises WhetErrors that list every fault with its line."""
    document = read_yaml(path)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        faults = [explain(fault, Recipe, document) for fault in error.errors()]
        raise WhetErrors(list({fault.where: fault for fault in faults}.values())) from None
    missing = _missing_sources(recipe, document)
    if missing:
        raise WhetErrors(missing)
    return _base_beside(recipe, path.parent)


def _base_beside(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a base model that is a folder beside it named by its full path."""
    if recipe.model.base.startswith("builtin:") or not (folder / recipe.model.base).is_dir():
        return recipe
    model = recipe.model.model_copy(update={"base": str((folder / recipe.model.base).resolve())})
    return recipe.model_copy(update={"model": model})


def _missing_sources(recipe: Recipe, document: Document) -> list[WhetError]:
    """An error for each source whose path matches no file."""
    folder = document.path.parent
    errors = []
    for key, sources in (("sources", recipe.data.sources), ("eval_sources", recipe.data.eval_sources)):
        for i, source in enumerate(sources):
            if not source.files(folder):
                where = document.where(("data", key, i, "path"))
                fix = f"paths start at {folder.absolute()}"
                errors.append(WhetError(f"no file matches {source.path!r}", where=where, fix=fix))
    return errors
