"""Hugging Face folder of a model of a known family -> GGUF files that llama.cpp loads, several in one pass.

The whole conversion: read and check config, tokenizer and tensor list; choose each tensor's type in each file; write
headers and metadata; then piece by piece read some rows, convert them, encode them once for each type that any file
wants, and write; reopen the files and compare every tensor with its source; only then give the files their names.
Container: gguf's GGUFWriter. Memory: two pieces of rows and their encodings, whatever the model's size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from whet.errors import WhetError
from whet.export.gguf_architectures import Architecture, architecture_of
from whet.export.gguf_checkpoint import Checkpoint
from whet.export.gguf_pieces import encode, pieces
from whet.export.gguf_plan import FilePlan, checked_tensors, plan_file, tensor_bytes, weights_of
from whet.export.gguf_tokenizer import GGUFTokenizer, read_tokenizer
from whet.export.gguf_verify import verify
from whet.export.imatrix import Imatrix
from whet.quant.gguf_mixes import MIXES, check_quantization
from whet.quant.gguf_types import GGUFType

__all__ = ["GGUFReport", "Progress", "verify", "write_gguf", "write_ggufs"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class GGUFReport:
    """What was written. `types`: tensor name -> type. `fallbacks`: tensor name -> why it got another type than the
    quantization asks for. `notes`: what llama.cpp may do differently from transformers."""

    path: Path
    quantization: str
    nbytes: int
    bits_per_weight: float
    types: dict[str, str]
    fallbacks: dict[str, str]
    notes: list[str]


def write_gguf(
    model_dir: Path,
    out: Path,
    quantization: str,
    *,
    imatrix: Imatrix | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> GGUFReport:
    """`write_ggufs` for one file."""
    (report,) = write_ggufs(
        model_dir, {quantization: out}, imatrix=imatrix, device=device, progress=progress, check=check
    )
    return report


def write_ggufs(
    model_dir: Path,
    files: Mapping[str, Path],
    *,
    imatrix: Imatrix | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> list[GGUFReport]:
    """Convert the folder `model_dir` (config, safetensors, tokenizer) to a file for each quantization, in one pass.

    files: quantization, a key of `MIXES`, -> file. imatrix: which columns of each matrix matter most. device: what
    encodes, "cpu" or "cuda"; None takes a GPU where there is one. progress: called with weights done, weights in all,
    tensor name. check: reopen the files and compare them with their source (`verify`) before they get their names.
    Raises WhetError for a model, tokenizer or weight that GGUF cannot hold, and when the disk is full; no file is then
    left that was not there before.
    """
    model_dir = Path(model_dir)
    for quantization in files:
        check_quantization(quantization)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    architecture = architecture_of(model_dir)
    tokenizer = read_tokenizer(model_dir, architecture.config.vocab)
    checkpoint = Checkpoint(model_dir)
    tensors = checked_tensors(architecture, checkpoint)
    if imatrix:
        imatrix.check_fits(tensors)
    plans = [
        plan_file(Path(path), quantization, architecture, tensors, imatrix is not None)
        for quantization, path in files.items()
    ]
    with _partial_files(plans) as partials:
        model = _Model(model_dir.absolute().name, architecture, tokenizer, imatrix)
        _write(dict(zip(partials, plans, strict=True)), model, checkpoint, device, progress)
        if check:
            verify(partials, model_dir, device)
    return [_report(plan, architecture.notes + tokenizer.notes) for plan in plans]


def _report(plan: FilePlan, notes: list[str]) -> GGUFReport:
    nbytes = plan.path.stat().st_size
    return GGUFReport(
        path=plan.path,
        quantization=plan.quantization,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / sum(map(weights_of, plan.tensors)),
        types={tensor.name: kind.name for tensor, kind in zip(plan.tensors, plan.types, strict=True)},
        fallbacks=plan.fallbacks,
        notes=notes,
    )


@contextmanager
def _partial_files(plans: list[FilePlan]) -> Iterator[list[Path]]:
    """Files beside those of the plans, which take their names when the block ends well, and are removed otherwise."""
    partials = [plan.path.with_name(f"{plan.path.name}.partial") for plan in plans]
    _check_room(plans)
    try:
        yield partials
        for partial, plan in zip(partials, plans, strict=True):
            os.replace(partial, plan.path)
    except OSError as error:
        raise WhetError(
            f"the file could not be written: {error}", where=str(plans[0].path), fix=_room_needed(plans)
        ) from error
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)


def _check_room(plans: list[FilePlan]) -> None:
    """Make the folders, and refuse what does not fit their disks."""
    for folder in {plan.path.parent for plan in plans}:
        here = [plan for plan in plans if plan.path.parent == folder]
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(plan.nbytes for plan in here), shutil.disk_usage(folder).free
        if free < needed:
            what = f"no space left: {needed:,} bytes needed, {free:,} free"
            raise WhetError(what, where=str(folder), fix=_room_needed(here))


def _room_needed(plans: list[FilePlan]) -> str:
    needed = sum(plan.nbytes for plan in plans)
    return f"free {needed:,} bytes there, or choose a smaller quantization or another folder"


@dataclass(frozen=True)
class _Model:
    """What every file's metadata tells."""

    name: str
    architecture: Architecture
    tokenizer: GGUFTokenizer
    imatrix: Imatrix | None


def _write(
    plans: dict[Path, FilePlan],
    model: _Model,
    checkpoint: Checkpoint,
    device: str,
    progress: Progress | None,
) -> None:
    """Write all files in one pass over the checkpoint. plans: the path to write to -> what to write there."""
    tensors = next(iter(plans.values())).tensors
    done, total = 0, sum(map(weights_of, tensors))
    with ExitStack() as stack:
        files = [stack.enter_context(_File(path, plan, model)) for path, plan in plans.items()]
        for piece in pieces(tensors, checkpoint, torch.device(device)):
            importance = model.imatrix and model.imatrix.importance(piece.tensor.name)
            columns = None if importance is None else torch.from_numpy(importance).to(device)
            types = {file.type for file in files}
            encoded = {kind.name: encode(piece, kind, columns) for kind in types}
            for file in files:
                file.write(encoded[file.type.name], piece.last)
            done += piece.x.numel()
            if progress:
                progress(done, total, piece.tensor.name)


class _File:
    """A GGUF file being written. Header and metadata are written on entry; then `write`, in the order of the plan."""

    def __init__(self, path: Path, plan: FilePlan, model: _Model):
        self.plan, self.model = plan, model
        self.next = 0  # the tensor that `write` goes on with
        self.writer = gguf.GGUFWriter(path, model.architecture.gguf_name)

    def __enter__(self) -> _File:
        self._add_metadata()
        factors = self.model.architecture.rope_factors()
        for name, factor in factors.items():
            self.writer.add_tensor_info(name, factor.shape, factor.dtype, factor.nbytes)
        for tensor, kind in zip(self.plan.tensors, self.plan.types, strict=True):
            nbytes = tensor_bytes(tensor, kind)
            self.writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind.ggml)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        assert self.writer.fout is not None
        (self.file,) = self.writer.fout
        self._pad()
        for factor in factors.values():
            factor.tofile(self.file)
            self._pad()
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    @property
    def type(self) -> GGUFType:
        """Of the tensor that `write` goes on with."""
        return self.plan.types[self.next]

    def write(self, data: NDArray[np.uint8], last: bool) -> None:
        """Append a piece of the tensor. last: the tensor ends with it."""
        data.tofile(self.file)
        if last:
            self._pad()
            self.next += 1

    def _pad(self) -> None:
        """Zeros up to where GGUF lets the next tensor begin."""
        self.writer.write_padding(self.file, self.file.tell())

    def _add_metadata(self) -> None:
        writer = self.writer
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(self.model.tokenizer.model_name(self.model.name))
        writer.add_file_type(MIXES[self.plan.quantization].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.model.architecture.add_metadata(writer)
        self.model.tokenizer.write(writer)
        if self.model.imatrix:
            self.model.imatrix.add_metadata(writer)
