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
from whet.evals.gate_rules import Rules
from whet.units import parse_memory
from whet.yaml_faults import Document, Kind, explain, read_yaml

Format = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt", "text", "preference"]
RECIPE = Kind("recipe", "`name:`, `model:` and `data:`", "`whet schema` prints every key")
TRAINING = "training"
"""As `export.imatrix`: the rows that the run was trained on."""
GGUFType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0",
    "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


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
    path: str | None = Field(
        None,
        pattern=r"^[^\x00]+$",
        description="File, glob or folder, relative to the recipe: .jsonl, .json, .parquet, .csv, .tsv, .txt, .md, "
        ".html, also .gz and .zst; a saved Hugging Face data set; with `sql`, a database file.",
    )
    sql: str | None = Field(
        None, description="A SELECT; over `url`, or over `path` (as the table `source` if no database)."
    )
    url: str | None = Field(
        None, description="PostgreSQL's address: postgresql://user@host/database; ${NAME} is an environment variable."
    )
    hub: str | None = Field(None, description="Name of a data set on the Hugging Face hub; goes to the network.")
    split: str | None = Field(None, description="Split of a data set that has several.")
    format: Format = Field("auto", description="Shape of a row; `auto` looks at the first one.")
    columns: dict[str, str] = Field(default_factory=dict, description="Names the format expects -> names the file has.")
    skip_unreadable: bool = Field(False, description="Leave out a folder's files of kinds that cannot be read.")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        places = [name for name in ("path", "url", "hub") if getattr(self, name) is not None]
        if len(places) != 1:
            given = " and ".join(places) or "nothing"
            raise ValueError(f"{given} says where the rows are; give one of path, url and hub")
        if self.url is not None and self.sql is None:
            raise ValueError("url names a database; say what to read from it, as sql: SELECT ...")
        if self.sql is not None and self.hub is not None:
            raise ValueError("sql is for databases and files, not for hub; leave it out")
        return self

    def files(self, base: Path) -> list[Path]:
        """The files that match, sorted; `path` starts at `base`. A name that exists is meant literally."""
        if self.path is None:
            return []
        pattern = os.path.join(base, os.path.expanduser(self.path))
        if os.path.isdir(pattern):
            found = glob.glob(os.path.join(glob.escape(pattern), "**"), recursive=True)
        else:
            found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        return sorted(Path(name) for name in found if os.path.isfile(name))


class Clean(Part):
    unicode: bool = Field(True, description="Mend text that was decoded wrongly, and compose accented letters.")
    controls: bool = Field(True, description="Remove control characters and invisible ones that carry nothing.")
    whitespace: bool = Field(True, description="Remove spaces at line ends and runs of empty lines.")
    html: bool = Field(False, description="Turn HTML into text.")


class Redact(Part):
    policy: str = Field(
        description="What is personal data and what becomes of it: hipaa-safe-harbor, cmmc-cui, gdpr-basic, or a file."
    )
    classes: dict[str, str] = Field(default_factory=dict, description="Class -> mode, over the policy's own.")
    key: str | None = Field(
        None, description="Key of pseudonyms and vault: a file made by `whet data key`, or env:NAME."
    )
    ner: str | None = Field(None, description="Folder of a local model that finds names and places.")
    vault: bool = Field(False, description="Keep the originals beside the data, encrypted with the key.")


class Dedup(Part):
    exact: bool = Field(True, description="Keep one of equal rows.")
    near: float | None = Field(
        0.85, ge=0.5, le=1, description="Keep one of rows whose phrases agree to this share (Jaccard); null for all."
    )


class Split(Part):
    eval: float = Field(
        0.1, gt=0, lt=1, description="Share of the rows held out for evaluation, chosen by a keyed hash."
    )
    group_by: str | None = Field(None, description="Column whose equal values stay on one side (customer, document).")
    stratify_by: str | None = Field(None, description="Column within whose values the share is met.")
    time: str | None = Field(None, description="Column of a row's date: rows from `at` on are held out.")
    at: str | None = Field(None, description='Date or time, as "2026-01-31".')

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        if (self.time is None) != (self.at is None):
            raise ValueError("time and at go together: the column, and the date from which on rows are held out")
        if self.time and (self.group_by or self.stratify_by):
            raise ValueError("a split by time has no group_by or stratify_by; leave them out")
        return self


class Leaks(Part):
    gate: Literal["refuse", "drop", "warn"] = Field(
        "refuse", description="What becomes of training rows that hold evaluation text."
    )
    tasks: list[str] = Field(
        default_factory=list, description="Files of evaluation tasks that training rows are checked against too."
    )


class Data(Part):
    sources: list[Source] = Field(min_length=1, description="Where the training rows come from.")
    eval_sources: list[Source] = Field(
        default_factory=list, description="Held-out rows, when they are files of their own."
    )
    bad_rows: float = Field(
        0.0, ge=0, lt=1, description="Share of the rows that may be unreadable; they are listed in quarantine.jsonl."
    )
    clean: Clean | None = Field(default_factory=Clean, description="What is mended in every text; null for nothing.")
    redact: Redact | None = Field(None, description="Take personal data out.")
    dedup: Dedup | None = Field(default_factory=Dedup, description="Take duplicates out; null for none.")
    split: Split | None = Field(
        None, description="Hold out a share of `sources`. Default: a tenth, unless eval_sources are given."
    )
    leaks: Leaks | None = Field(
        default_factory=Leaks, description="Compare training rows with held-out ones; null for no check."
    )
    train_on: Literal["responses", "last", "all"] = Field(
        "responses", description="Tokens that carry loss: every assistant turn, the last one, or everything."
    )
    engine: Literal["local", "ray"] = Field(
        "local", description="Prepare on all cores of this machine, or on a Ray cluster (RAY_ADDRESS)."
    )


class EarlyStop(Part):
    patience: int = Field(3, ge=1, description="Checkpoints in a row without a lower held-out loss.")
    min_gain: float = Field(0.002, ge=0, lt=1, description="Share by which a loss must be lower to count as lower.")


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
    early_stop: EarlyStop | None = Field(
        None, description="Measure the held-out loss at checkpoints, stop when it rises, and keep the best checkpoint."
    )
    on_nan: Literal["back-off", "stop"] = Field(
        "back-off", description="At a loss that is no number: leave out the batch or lower the rate, or stop."
    )
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
    tasks: list[str] = Field(default_factory=list, description="Files of evaluation tasks, or globs.")
    allow_python: bool = Field(
        False, description="Let tasks run Python that they name: scorers, and functions of lm-eval."
    )
    every: Literal["end", "checkpoint"] = Field(
        "end", description="Ask the tasks when training is done, or also at every checkpoint."
    )
    samples: int = Field(0, ge=0, description="Held-out questions that every checkpoint answers, for the report.")
    general_text: str | None = Field(
        None, description="File of text that the model should not forget; its perplexity is measured before and after."
    )
    gate: Rules | None = Field(None, description="What the tuned model must reach to be exported.")

    @model_validator(mode="after")
    def _gate_has_tasks(self) -> Eval:
        if self.gate and not self.tasks:
            raise ValueError("gate decides by the scores of eval.tasks, and there are none; name a task's file")
        if self.gate and self.gate.max_perplexity_increase is not None and self.general_text is None:
            raise ValueError("gate.max_perplexity_increase needs eval.general_text; name a file of text")
        return self


class Track(Part):
    mlflow: str | None = Field(None, description="MLflow: `sqlite`, a file beside the runs; or a server's address.")
    wandb: Literal["offline", "online"] | None = Field(
        None, description="Weights & Biases; online goes to the network."
    )
    tensorboard: bool = Field(False, description="Event files in the run's folder.")
    project: str = Field("whet", min_length=1, description="Experiment or project of the trackers.")


class Export(Part):
    merged: Literal["bf16", "fp16", "fp32", "nf4", "fp8", "int8", "w4a16"] | None = Field(
        None, description="Write the model with its adapter merged in, in this type; fp8, int8 and w4a16 are for vLLM."
    )
    gguf: list[GGUFType] = Field(default_factory=list, description="GGUF files to write, by type.")
    gguf_adapter: bool = Field(False, description="Write the adapter alone as GGUF, for llama.cpp to put on the base.")
    imatrix: str | None = Field(
        None,
        description="What the rounding of GGUF files goes by: `training`, an importance matrix measured on the rows "
        "that were trained on; or a file of rows, of text, or of llama-imatrix.",
    )
    base: Literal["dequantized", "original"] = Field(
        "dequantized", description="What the adapter is added to: the base as training saw it, or its 16-bit original."
    )
    proof: bool = Field(
        True, description="Compare each artifact with the tuned model, GGUF in llama.cpp; false says so in the card."
    )

    @property
    def anything(self) -> bool:
        """Whether there is more to write than the adapter as it was trained."""
        return bool(self.merged or self.gguf or self.gguf_adapter)


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
    track: Track = Field(default_factory=Track, description="Who else is told of the run; metrics.jsonl always is.")

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
        if self.export.gguf_adapter and (self.adapter is None or self.adapter.dora):
            made = "every weight is trained (adapter: null)" if self.adapter is None else "adapter.dora is true"
            raise ValueError(f"export.gguf_adapter writes a LoRA alone, but {made}; leave gguf_adapter out")
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
    document = read_yaml(path, RECIPE)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        faults = [explain(fault, Recipe, document) for fault in error.errors()]
        raise WhetErrors(list({fault.where: fault for fault in faults}.values())) from None
    missing = [*_missing_sources(recipe, document), *_missing_imatrix(recipe, document)]
    if missing:
        raise WhetErrors(missing)
    return _beside(recipe, path.parent)


def _beside(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with what lies beside it named by its full path: the base model's folder, the file for imatrix."""
    model, export = recipe.model, recipe.export
    if not model.base.startswith("builtin:") and (folder / model.base).is_dir():
        model = model.model_copy(update={"base": str((folder / model.base).resolve())})
    if export.imatrix not in (None, TRAINING):
        export = export.model_copy(update={"imatrix": str((folder / export.imatrix).resolve())})
    return recipe.model_copy(update={"model": model, "export": export})


def _missing_imatrix(recipe: Recipe, document: Document) -> list[WhetError]:
    name, folder = recipe.export.imatrix, document.path.parent
    if name in (None, TRAINING) or (folder / name).is_file():
        return []
    where = document.where(("export", "imatrix"))
    fix = f"{TRAINING}, or the name of a file; paths start at {folder.absolute()}"
    return [WhetError(f"there is no file {name!r}", where=where, fix=fix)]


def _missing_sources(recipe: Recipe, document: Document) -> list[WhetError]:
    """An error for each source whose path matches no file."""
    folder = document.path.parent
    errors = []
    for key, sources in (("sources", recipe.data.sources), ("eval_sources", recipe.data.eval_sources)):
        for i, source in enumerate(sources):
            if source.path is not None and not source.files(folder):
                where = document.where(("data", key, i, "path"))
                fix = f"paths start at {folder.absolute()}"
                errors.append(WhetError(f"no file matches {source.path!r}", where=where, fix=fix))
    return errors
