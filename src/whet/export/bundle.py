"""A finished export: one folder that holds everything, and that exists only when what it holds was proven.

OUT/
  merged/                   for transformers and vLLM: weights, config, tokenizer, template
  model-TYPE.gguf           for llama.cpp, one for each type
  model.imatrix             the importance matrix that guided their rounding, in llama.cpp's format
  adapter/adapter.gguf      the adapter alone, for llama.cpp to put on a base
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from whet.data.fingerprint import fingerprint, keep
from whet.errors import WhetError
from whet.export import checksums, model_card
from whet.export.artifacts import Artifacts, Calibration, Progress
from whet.export.imatrix import Imatrix
from whet.export.model_card import Artifact, Origin
from whet.export.proof import Proof, Reference, checks, page
from whet.export.proof.reference import Model
from whet.export.wanted import Wanted
from whet.files import staged_folder, write_text
from whet.pages.numbers import count

LIST = "export.json"


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
    importance: Imatrix | Calibration | None = None,
    progress: Progress = lambda step: None,
) -> list[Artifact]:
    """Write the folder `out`, which may not exist or be empty, with its checksums. See `write_bundle`."""
    if out.is_dir() and any(out.iterdir()):
        raise WhetError("the folder is not empty", where=str(out), fix="name another one, or remove it first")
    report = out.absolute().with_name(f"{out.name}-not-proven")
    with staged_folder(out) as staged:
        made = write_bundle(
            model,
            tokenizer,
            staged,
            wanted,
            origin,
            prompts,
            report=report,
            importance=importance,
            progress=progress,
        )
        progress("checksums")
        checksums.write_checksums(staged)
    return made


def write_bundle(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    wanted: Wanted,
    origin: Origin,
    prompts: Prompts,
    *,
    report: Path,
    importance: Imatrix | Calibration | None = None,
    progress: Progress = lambda step: None,
) -> list[Artifact]:
    """Write everything but the checksums into `folder`, an empty one that gets its name when all is in it.

    model: the tuned model: an adapter on its base, or one of which every weight was trained. prompts: held-out ones.
    report: the folder for proof.json and proof.html where an artifact fails; nothing is written there otherwise.
    importance: what the rounding of GGUF files goes by.
    Raises WhetError for what can't be written, and for an artifact that does not say what the model says.
    """
    wanted.check()
    reference = None
    if wanted.proven:
        progress("asking the tuned model")
        reference = Reference.of(model, tokenizer, prompts.texts)
    with tempfile.TemporaryDirectory(prefix=".whet-", dir=folder.parent) as scratch:
        work = Artifacts(model, tokenizer, folder, Path(scratch), wanted, reference, importance, progress)
        artifacts = work.all(origin)
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
    return artifacts


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
            fix="nothing was exported; see the report. If only rounding is at fault: whet export, in a finer format",
        )
