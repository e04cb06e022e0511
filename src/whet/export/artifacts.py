"""The artifacts of an export, made one after another and each compared with the tuned model: merged folder, GGUF files,
GGUF adapter; and what their engines want beside them. `bundle` puts them together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from whet.errors import WhetError
from whet.export.gguf import write_gguf, write_ggufs
from whet.export.gguf_adapter import write_gguf_adapter
from whet.export.gguf_architectures import architecture_of
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.imatrix import Imatrix
from whet.export.imatrix_measure import measure_imatrix
from whet.export.json_files import read_json
from whet.export.launch import write_launch
from whet.export.merge import QUANTIZED, save_merged
from whet.export.merge_formats import FLOATS
from whet.export.merge_stream import without_quantization
from whet.export.model_card import Artifact, Origin
from whet.export.modelfile import modelfile
from whet.export.proof import Proof, Reference, prove_adapter, prove_folder, prove_gguf
from whet.export.proof.reference import Model, end_tokens
from whet.export.vocabulary import check_vocabulary
from whet.export.wanted import Wanted
from whet.files import write_text

FOLDER = "merged"
ADAPTER = "adapter/adapter.gguf"
"""In a folder of its own: the GGUF files of the export's are models."""
IMATRIX = "model.imatrix"
METHODS = {name: method for method, name in QUANTIZED.items()}
GGUF_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

CHUNK, CHUNKS = 512, 128
"""Tokens of a chunk that an importance matrix is measured on, and how many chunks: more move it little."""

Progress = Callable[[str], None]
"""Told what is being done, in words."""


@dataclass(frozen=True)
class Calibration:
    """Text to measure an importance matrix on, and which it is, in words."""

    texts: Sequence[str]
    words: str


class Artifacts:
    """What one export makes of `model` in `folder`. proofs, modelfiles: what was made so far. scratch: a folder for the
    time being. reference: None where nothing is to be proven."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        scratch: Path,
        wanted: Wanted,
        reference: Reference | None,
        importance: Imatrix | Calibration | None,
        progress: Progress,
    ):
        self.model, self.tokenizer, self.folder, self.scratch = model, tokenizer, folder, scratch
        self.wanted, self.reference, self.progress = wanted, reference, progress
        self.importance = importance
        self.proofs: list[Proof] = []
        self.modelfiles: dict[str, str] = {}
        self.sources: dict[torch.dtype, Path] = {}

    def all(self, origin: Origin) -> list[Artifact]:
        """Every artifact that is wanted. The adapter comes first: what GGUF can't hold of it is told at once."""
        adapter = self.adapter(origin)
        return [*self.merged(), *self.ggufs(), *adapter]

    # ---------------------------------------------------------------- merged

    def merged(self) -> list[Artifact]:
        """The merged folder, if one is wanted, and its proof."""
        if not (format := self.wanted.merged):
            return []
        path = self.folder / FOLDER
        self.progress(f"merging, {format}")
        self._merge(path, METHODS.get(format, "merged_16bit"), FLOATS.get(format))
        if format in FLOATS:
            self.sources[FLOATS[format]] = path
        if self.reference:
            self.progress(f"proving {FOLDER}")
            self.proofs.append(prove_folder(self.reference, path, format))
        return [Artifact(FOLDER, "merged", format, _size(path))]

    def _merge(self, path: Path, method: str, dtype: torch.dtype | None) -> None:
        """Write the merged model, with every token that ends an answer, and check that its tokenizer fits."""
        save_merged(self.model, path, self.tokenizer, method=method, base=self.wanted.base, dtype=dtype)
        _write_ends(path / "generation_config.json", sorted(end_tokens(self.model, self.tokenizer)))
        check_vocabulary(path)

    # ---------------------------------------------------------------- GGUF

    def ggufs(self) -> list[Artifact]:
        """The GGUF files that are wanted, and their proofs. Those from one merge are written in one pass."""
        made = []
        for dtype, names in self._by_source().items():
            source = self._source(dtype)
            imatrix = None if names == ["f32"] else self.imatrix
            self.progress(f"writing GGUF, {', '.join(names)}")
            files = {name: self.folder / f"model-{name}.gguf" for name in names}
            # The proof compares every tensor with its source, so that it need not be done twice.
            reports = write_ggufs(source, files, imatrix=imatrix, check=self.reference is None)
            for report in reports:
                notes = (*report.notes, *(f"{name} is held as {kept}" for name, kept in report.fallbacks.items()))
                path, name = report.path, report.quantization
                made.append(Artifact(path.name, "gguf", name, path.stat().st_size, notes))
                if self.reference:
                    self.progress(f"proving {path.name}")
                    self.proofs.append(prove_gguf(self.reference, path, name, source, imatrix=imatrix is not None))
        return sorted(made, key=lambda one: self.wanted.gguf.index(one.format))

    @cached_property
    def imatrix(self) -> Imatrix | None:
        """What guides the rounding, measured on the merged model unless it was given; kept in the export's folder."""
        found = self.importance
        if isinstance(found, Calibration):
            self.progress("measuring the importance matrix")
            found = measure_imatrix(
                self._source(self._half()),
                found.texts,
                chunk_size=CHUNK,
                max_chunks=CHUNKS,
                dataset=found.words,
                progress=lambda done: self.progress(f"measuring the importance matrix, {done * CHUNK:,} tokens"),
            )
        if found is not None:
            found.save(self.folder / IMATRIX)
        return found

    def _by_source(self) -> dict[torch.dtype, list[str]]:
        """The quantizations, by the type of the merged weights that they are made from: F32 from fp32, others from 16
        bits, so that they and a merged model hold the same weights."""
        found: dict[torch.dtype, list[str]] = {}
        for name in dict.fromkeys(self.wanted.gguf):
            found.setdefault(torch.float32 if name == "f32" else self._half(), []).append(name)
        return found

    def _half(self) -> torch.dtype:
        if self.wanted.merged in ("bf16", "fp16"):
            return FLOATS[self.wanted.merged]
        return torch.float16 if self.model.dtype == torch.float16 else torch.bfloat16

    def _source(self, dtype: torch.dtype) -> Path:
        """A folder of the merged model in `dtype`: the one that is exported, or one for the time being."""
        if dtype not in self.sources:
            path = self.scratch / str(dtype)
            self.progress("merging, for GGUF")
            self._merge(path, "merged_16bit", dtype)
            self.sources[dtype] = path
        return self.sources[dtype]

    # ---------------------------------------------------------------- GGUF adapter

    def adapter(self, origin: Origin) -> list[Artifact]:
        """The adapter alone as GGUF, if it is wanted, and its proof on the base that it was trained on."""
        if not self.wanted.gguf_adapter:
            return []
        if not isinstance(self.model, PeftModel):
            fix = "leave it out; a GGUF file of the whole model is --gguf q4_k_m"
            raise WhetError("every weight was trained: there is no adapter", where="--gguf-adapter", fix=fix)
        path, saved = self.folder / ADAPTER, self.scratch / "adapter"
        self.progress("writing the adapter as GGUF")
        self.model.save_pretrained(str(saved), save_embedding_layers=False)
        plain: Model = self.model.get_base_model()
        config = without_quantization(plain.config)
        config.architectures = [type(plain).__name__]
        config.save_pretrained(saved / "base")
        write_gguf_adapter(saved, saved / "base", path)
        if self.reference:
            self.progress(f"proving {path.name}")
            self.proofs.append(self._adapter_proof(self.reference, path))
        note = (
            f"`{ADAPTER}` is the adapter alone, for a GGUF file of {origin.base}: `llama-server -m BASE.gguf --lora "
            f"{ADAPTER}`, or in a Modelfile `FROM` that file and `ADAPTER ./{ADAPTER}`. It was compared on the base "
            "as training held it; on one that is rounded otherwise it answers a little differently."
        )
        return [Artifact(ADAPTER, "adapter", "LoRA", path.stat().st_size, (note,))]

    def _adapter_proof(self, reference: Reference, path: Path) -> Proof:
        """The proof needs the base in GGUF too: as the adapter saw it, in the type that the model computes in."""
        dtype = self.model.dtype
        folder, base = self.scratch / "base", self.scratch / "base.gguf"
        with _without_adapters(self.model):
            save_merged(self.model, folder, self.tokenizer, base=self.wanted.base, dtype=dtype)
        write_gguf(folder, base, GGUF_TYPES[dtype], check=False)
        return prove_adapter(reference, path, base, folder, computed=GGUF_TYPES[dtype])

    # ---------------------------------------------------------------- beside them

    def extras(self, origin: Origin) -> list[str]:
        """Modelfiles, vLLM's files, the tokenizer where no merged folder holds it; notes on what could not be had."""
        notes = []
        if self.wanted.gguf:
            notes += self._modelfiles(origin)
        if self.importance is not None and (matrix := self.imatrix) is not None:
            on = f" of {matrix.chunks * matrix.chunk_size:,} tokens" * bool(matrix.chunks * matrix.chunk_size)
            which = f" ({', '.join(matrix.datasets)})" if matrix.datasets else ""
            notes.append(f"The rounding of the GGUF files went by an importance matrix{on}{which}: `{IMATRIX}`.")
        if self.wanted.merged:
            context = self.model.config.get_text_config().max_position_embeddings
            write_launch(self.folder, model=FOLDER, name=origin.name, format=self.wanted.merged, context=context)
        else:
            self.tokenizer.save_pretrained(self.folder / "tokenizer")
        return notes

    def _modelfiles(self, origin: Origin) -> list[str]:
        source = next(iter(self.sources.values()))
        architecture = architecture_of(source)
        adds_bos = read_tokenizer(source, architecture.config.vocab).add_bos
        for i, name in enumerate(self.wanted.gguf):
            gguf = f"model-{name}.gguf"
            try:
                text = modelfile(
                    gguf,
                    self.tokenizer,
                    self.model.generation_config,
                    ends=end_tokens(self.model, self.tokenizer),
                    context=architecture.context,
                    adds_bos=adds_bos,
                    licence=origin.licence.text,
                )
            except WhetError as error:
                return [f"There is no Modelfile for Ollama: {error.what}. Instead: {error.fix}."]
            self.modelfiles[gguf] = "Modelfile" if i == 0 else f"Modelfile-{name}"
            write_text(self.folder / self.modelfiles[gguf], text)
        return []


def _write_ends(path: Path, ends: list[int]) -> None:
    """Name every token that ends an answer. The base's own settings may not know the one that the chat template ends
    answers with, and transformers' generate, which goes by this file, would go past it."""
    settings = read_json(path) if path.is_file() else {}
    write_text(path, json.dumps({**settings, "eos_token_id": ends}, indent=2) + "\n")


@contextmanager
def _without_adapters(model: PeftModel) -> Iterator[None]:
    """Adapters at scale 0: a merge then writes the base as they saw it."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
