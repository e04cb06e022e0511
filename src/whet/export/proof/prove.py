"""The order of a proof: what can be told from the files first, then what the engine says.

An artifact whose files are at fault is not run: what it would answer proves nothing, and it might not load.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from whet.errors import WhetError
from whet.export.proof.adapter_file import AdapterFile
from whet.export.proof.behaviour import Engine, compare
from whet.export.proof.checks import Check, Proof
from whet.export.proof.folder import MergedFolder
from whet.export.proof.gguf_file import GGUFFile
from whet.export.proof.limits import Limits, limits_of
from whet.export.proof.reference import Reference
from whet.export.proof.share import Layers, share_checks


class Artifact(Engine, Layers, Protocol):
    """What was exported, in its engine."""

    path: Path
    format: str
    engine: str

    def static_checks(self) -> list[Check]: ...

    def engine_checks(self) -> list[Check]: ...


def prove_folder(reference: Reference, folder: Path, format: str) -> Proof:
    """Compare a merged model's folder with the model it was made from."""
    return prove(reference, MergedFolder(folder, format, reference))


def prove_gguf(
    reference: Reference,
    path: Path,
    quantization: str,
    made_from: Path,
    *,
    imatrix: bool = False,
    threads: int | None = None,
) -> Proof:
    """Compare a GGUF file with the model it was made from.

    made_from: the merged folder that it was written from; imatrix: with an importance matrix, which changes its types.
    threads: of llama.cpp; see `llama_cpp.threads_for`.
    """
    return prove(
        reference,
        GGUFFile(path, quantization, reference, made_from, imatrix=imatrix, threads=threads),
    )


def prove_adapter(
    reference: Reference,
    path: Path,
    base: Path,
    base_folder: Path,
    *,
    computed: str = "f32",
    threads: int | None = None,
) -> Proof:
    """Compare a GGUF adapter on its base with the adapter and base that it was made from.

    base: a GGUF file of the base, written from base_folder in `computed`: the GGUF type of what the model computes in,
    by whose limits answers go. The adapter itself is not rounded.
    """
    limits = replace(limits_of(computed), share=limits_of("f32").share)
    file = AdapterFile(path, reference, base, base_folder, threads=threads)
    return prove(reference, file, limits)


def prove(reference: Reference, artifact: Artifact, limits: Limits | None = None) -> Proof:
    """Every check. limits: in place of the format's own."""
    limits = limits or limits_of(artifact.format)
    checks = artifact.static_checks()
    measures: dict[str, float | int] = {}
    try:
        if all(check.passed for check in checks):
            checks += artifact.engine_checks()
        if all(check.passed for check in checks):
            checks += share_checks(reference, artifact, limits)
            found, measures = compare(reference, artifact, limits)
            checks += found
    except WhetError as error:
        checks.append(Check("runs", False, error.what))
    return Proof(artifact.path.name, artifact.format, artifact.engine, tuple(checks), measures)
