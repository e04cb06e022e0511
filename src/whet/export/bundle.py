"""A finished export: one folder that holds everything, and that exists only when what it holds was proven.

OUT/
  merged/                   for transformers and vLLM: weights, config, tokenizer, template
  model-TYPE.gguf           for llama.cpp, one for each type
  Modelfile, Modelfile-TYPE for Ollama; the first GGUF file has the plain name
  vllm.yaml, vllm.sh        for vLLM, where there is a merged model
  tokenizer/                where there is none
  fingerprint.json          of the tokenizer
  base-licence/             texts of the base's licence, where they were found
  proof.json, proof.html    what was compared, and with what result
  export.json               the artifacts, for programs
  README.md, SHA256SUMS     the model card; digests of all other files
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from whet.data.fingerprint import fingerprint, keep
from whet.errors import WhetError
from whet.export import checksums, llama_cpp, model_card
from whet.export.gguf import write_ggufs
from whet.export.gguf_architectures import architecture_of
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.json_files import read_json
from whet.export.launch import write_launch
from whet.export.merge import QUANTIZED, save_merged
from whet.export.merge_formats import FLOATS
from whet.export.model_card import Artifact, Origin
from whet.export.modelfile import modelfile
from whet.export.proof import Proof, Reference, checks, page, prove_folder, prove_gguf
from whet.export.proof.limits import limits_of
from whet.export.proof.reference import Model, end_tokens
from whet.export.vocabulary import check_vocabulary
from whet.files import staged_folder, write_text
from whet.pages.numbers import count
from whet.quant.gguf_mixes import check_quantization

MERGED = (*FLOATS, *QUANTIZED.values())
METHODS = {name: method for method, name in QUANTIZED.items()}
LIST = "export.json"
FOLDER = "merged"

Progress = Callable[[str], None]
"""Told what is being done, in words."""


@dataclass(frozen=True)
class Wanted:
    """What to write. merged: one of MERGED. gguf: quantizations. base: what the adapter is added to, see
    merge.py. proven: compare every artifact with the tuned model, and refuse the export where one differs."""

    merged: str | None = None
    gguf: tuple[str, ...] = ()
    base: str = "dequantized"
    proven: bool = True

    def check(self) -> None:
        """Raises WhetError for what can't be written, and for engines that are not there to prove it."""
        if not self.merged and not self.gguf:
            raise WhetError("nothing is to be written", where="export", fix="--merged bf16, or --gguf q4_k_m")
        if self.merged and self.merged not in MERGED:
            raise WhetError(f"unknown format {self.merged!r}", where="merged", fix=f"use one of {', '.join(MERGED)}")
        for name in self.gguf:
            check_quantization(name)
            limits_of(name)
        if self.gguf and self.proven and llama_cpp.find() is None:
            raise WhetError(
                "GGUF files are proven in llama.cpp, which is not installed",
                where=str(llama_cpp.default_folder()),
                fix="add --fetch-llama-cpp to get it from npm, set WHET_NODE to its folder, or add --unproven",
            )


@dataclass(frozen=True)
class Prompts:
    """Rendered prompts, generation prompt included, and which ones they are, in words."""

    texts: Sequence[str]
    words: str


def export_bundle(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    wanted: Wanted,
    origin: Origin,
    prompts: Prompts,
    *,
    progress: Progress = lambda step: None,
) -> list[Artifact]:
    """Write the folder `out`, which may not exist or be empty. See `write_bundle`."""
    if out.is_dir() and any(out.iterdir()):
        raise WhetError("the folder is not empty", where=str(out), fix="name another one, or remove it first")
    report = out.absolute().with_name(f"{out.name}-not-proven")
    with staged_folder(out) as staged:
        return write_bundle(model, tokenizer, staged, wanted, origin, prompts, report=report, progress=progress)


def write_bundle(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    wanted: Wanted,
    origin: Origin,
    prompts: Prompts,
    *,
    report: Path,
    progress: Progress = lambda step: None,
) -> list[Artifact]:
    """Write everything into `folder`, an empty one that gets its name when this returns.

    model: the tuned model: an adapter on its base, or one of which every weight was trained. prompts: held-out ones.
    report: the folder for proof.json and proof.html where an artifact fails; nothing is written there otherwise.
    Raises WhetError for what can't be written, and for an artifact that does not say what the model says.
    """
    wanted.check()
    reference = None
    if wanted.proven:
        progress("asking the tuned model")
        reference = Reference.of(model, tokenizer, prompts.texts)
    with tempfile.TemporaryDirectory(prefix=".whet-", dir=folder.parent) as scratch:
        work = _Work(model, tokenizer, folder, Path(scratch), wanted, reference, progress)
        artifacts = [*work.merged(), *work.ggufs()]
        words = _compared_on(reference, prompts) if reference else ""
        if reference:
            _keep_proofs(work.proofs, folder, origin.name, words, report)
        notes = [*work.extras(origin), *dict.fromkeys(note for one in artifacts for note in one.notes)]
    found = fingerprint(tokenizer)
    keep(found, folder)
    origin.licence.copy(folder)
    model_card.write_card(
        folder,
        origin,
        artifacts,
        work.proofs,
        prompts=words,
        modelfiles=work.modelfiles,
        fingerprint=found,
        notes=notes,
    )
    listed = {
        "name": origin.name,
        "base": origin.base,
        "proven": wanted.proven,
        "artifacts": list(map(asdict, artifacts)),
    }
    write_text(folder / LIST, json.dumps(listed, indent=1) + "\n")
    progress("checksums")
    checksums.write_checksums(folder)
    return artifacts


class _Work:
    """The steps of one export. proofs, modelfiles: what they have made so far."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        scratch: Path,
        wanted: Wanted,
        reference: Reference | None,
        progress: Progress,
    ):
        self.model, self.tokenizer, self.folder, self.scratch = model, tokenizer, folder, scratch
        self.wanted, self.reference, self.progress = wanted, reference, progress
        self.proofs: list[Proof] = []
        self.modelfiles: dict[str, str] = {}
        self.sources: dict[torch.dtype, Path] = {}

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

    def ggufs(self) -> list[Artifact]:
        """The GGUF files that are wanted, and their proofs. Those from one merge are written in one pass."""
        made = []
        for dtype, names in self._by_source().items():
            source = self._source(dtype)
            self.progress(f"writing GGUF, {', '.join(names)}")
            files = {name: self.folder / f"model-{name}.gguf" for name in names}
            # The proof compares every tensor with its source, so that it need not be done twice.
            reports = write_ggufs(source, files, check=self.reference is None)
            for report in reports:
                notes = (*report.notes, *(f"{name} is held as {kept}" for name, kept in report.fallbacks.items()))
                path = report.path
                made.append(Artifact(path.name, "gguf", report.quantization, path.stat().st_size, notes))
                if self.reference:
                    self.progress(f"proving {path.name}")
                    self.proofs.append(prove_gguf(self.reference, path, report.quantization, source))
        return sorted(made, key=lambda one: self.wanted.gguf.index(one.format))

    def extras(self, origin: Origin) -> list[str]:
        """Modelfiles, vLLM's files, the tokenizer where no merged folder holds it; notes on what could not be had."""
        notes = []
        if self.wanted.gguf:
            notes += self._modelfiles(origin)
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

    def _by_source(self) -> dict[torch.dtype, list[str]]:
        """The quantizations, by the type of the merged weights that they are made from: F32 from fp32, others from 16
        bits, so that they and a merged model hold the same weights."""
        half = torch.float16 if self.model.dtype == torch.float16 else torch.bfloat16
        if self.wanted.merged in ("bf16", "fp16"):
            half = FLOATS[self.wanted.merged]
        found: dict[torch.dtype, list[str]] = {}
        for name in dict.fromkeys(self.wanted.gguf):
            found.setdefault(torch.float32 if name == "f32" else half, []).append(name)
        return found

    def _source(self, dtype: torch.dtype) -> Path:
        """A folder of the merged model in `dtype`: the one that is exported, or one for the time being."""
        if dtype not in self.sources:
            path = self.scratch / str(dtype)
            self.progress("merging, for GGUF")
            self._merge(path, "merged_16bit", dtype)
            self.sources[dtype] = path
        return self.sources[dtype]

    def _merge(self, path: Path, method: str, dtype: torch.dtype | None) -> None:
        """Write the merged model, with every token that ends an answer, and check that its tokenizer fits."""
        save_merged(self.model, path, self.tokenizer, method=method, base=self.wanted.base, dtype=dtype)
        _write_ends(path / "generation_config.json", sorted(end_tokens(self.model, self.tokenizer)))
        check_vocabulary(path)


def _write_ends(path: Path, ends: list[int]) -> None:
    """Name every token that ends an answer. The base's own settings may not know the one that the chat template ends
    answers with, and transformers' generate, which goes by this file, would go past it."""
    settings = read_json(path) if path.is_file() else {}
    write_text(path, json.dumps({**settings, "eos_token_id": ends}, indent=2) + "\n")


def _compared_on(reference: Reference, prompts: Prompts) -> str:
    """Which prompts answers were compared on, in a sentence."""
    tokens = sum(len(one.log_probs) for one in reference.asked)
    return f"Compared on {count(len(reference.texts))} {prompts.words}, {count(tokens)} tokens."


def _keep_proofs(proofs: list[Proof], folder: Path, name: str, words: str, report: Path) -> None:
    """Write the proofs into the export; or into `report`, and raise WhetError, where one did not pass."""
    failed = [proof for proof in proofs if not proof.passed]
    target = report if failed else folder
    target.mkdir(parents=True, exist_ok=True)
    checks.save(proofs, target)
    page.write_proof(proofs, target / page.NAME, name=name, prompts=words)
    if failed:
        first = failed[0].failed[0]
        more = sum(len(proof.failed) for proof in failed) - 1
        raise WhetError(
            f"{failed[0].artifact} is not what was trained: {first.name}: {first.what}"
            + (f"; {more} more checks failed" if more else ""),
            where=str(report / page.NAME),
            fix="nothing was exported; see the report, and choose a finer format if only rounding is at fault",
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
