"""Hugging Face folder of a Llama-architecture model -> one GGUF file that llama.cpp loads.

The whole conversion: read and check config, tokenizer and tensor list; choose each tensor's type; write header and
metadata; then tensor by tensor read, reorder, encode, write, so that host memory holds one tensor at a time; reopen the
file and compare every tensor with its source; only then give the file its name. Container: gguf's GGUFWriter.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from whet.errors import WhetError
from whet.export.gguf_checkpoint import Checkpoint
from whet.export.gguf_llama import (
    LlamaConfig,
    SourceTensor,
    add_architecture_metadata,
    expected_tensors,
    optional_tensors,
    read_config,
    reorder_heads,
    rope_factors,
)
from whet.export.gguf_tokenizer import GGUFTokenizer, read_tokenizer
from whet.quant.gguf_types import QUANTIZATIONS, TYPES, GGUFType, check_quantization, fitting_type, wanted_type

ROPE_FACTORS = "rope_freqs.weight"
# Weights a task, when encoding and comparing on several threads.
_SHARE = 1 << 20

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


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file to be: where it comes from, and its type."""

    tensor: SourceTensor
    type: GGUFType

    @property
    def nbytes(self) -> int:
        *rows, cols = self.tensor.shape
        return int(np.prod(rows, dtype=np.int64)) * self.type.row_bytes(cols)

    @property
    def weights(self) -> int:
        return int(np.prod(self.tensor.shape, dtype=np.int64))


def write_gguf(
    model_dir: Path,
    out: Path,
    quantization: str,
    *,
    progress: Progress | None = None,
    check: bool = True,
) -> GGUFReport:
    """Convert the folder `model_dir` (config, safetensors, tokenizer) to the file `out`.

    quantization: f32, f16, bf16, q8_0 or q4_k_m. progress: called with weights done, weights in all, tensor name.
    check: reopen the file and compare it with its source (`verify`) before it gets its name.
    Raises WhetError for a model, tokenizer or weight that GGUF cannot hold, and when the disk is full; nothing is then
    left under `out` that was not there before.
    """
    model_dir, out = Path(model_dir), Path(out)
    check_quantization(quantization)
    config = read_config(model_dir)
    tokenizer = read_tokenizer(model_dir, config.vocab)
    with Checkpoint(model_dir) as checkpoint:
        plan, fallbacks = _plan(config, checkpoint, quantization)
        factors = rope_factors(config)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _partial_file(out, sum(planned.nbytes for planned in plan)) as partial:
            _write(
                partial, model_dir.absolute().name, config, tokenizer, plan, factors, checkpoint, quantization, progress
            )
            if check:
                verify(partial, model_dir)
    weights = sum(planned.weights for planned in plan)
    nbytes = out.stat().st_size
    return GGUFReport(
        path=out,
        quantization=quantization,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / weights,
        types={planned.tensor.name: planned.type.name for planned in plan},
        fallbacks=fallbacks,
        notes=tokenizer.notes,
    )


def _plan(config: LlamaConfig, checkpoint: Checkpoint, quantization: str) -> tuple[list[_Planned], dict[str, str]]:
    plan, fallbacks = [], {}
    for tensor in _tensors(config, checkpoint):
        wanted = wanted_type(quantization, tensor.name, len(tensor.shape), config.layers, config.tied)
        chosen = fitting_type(wanted, tensor.shape[-1])
        if chosen is not wanted:
            fallbacks[tensor.name] = (
                f"{chosen.name} instead of {wanted.name}: rows of {tensor.shape[-1]} weights do not divide into blocks "
                f"of {wanted.block_size}"
            )
        plan.append(_Planned(tensor, chosen))
    return plan, fallbacks


def _tensors(config: LlamaConfig, checkpoint: Checkpoint) -> list[SourceTensor]:
    """The model's tensors, checked against those of the checkpoint: none missing, none left over, every shape right."""
    present = [tensor for tensor in optional_tensors(config) if tensor.source in checkpoint.shapes]
    tensors = expected_tensors(config) + present
    # lm_head.weight of a tied model is a copy of the embedding; inv_freq is a buffer of old checkpoints.
    known = {tensor.source for tensor in tensors} | ({"lm_head.weight"} if config.tied else set())
    unknown = [name for name in checkpoint.shapes if name not in known and not name.endswith("rotary_emb.inv_freq")]
    missing = [tensor.source for tensor in tensors if tensor.source not in checkpoint.shapes]
    for fault, names in (("lacks", missing), ("holds, but GGUF's llama has no place for,", unknown)):
        if names:
            raise WhetError(
                f"the checkpoint {fault} {len(names)} tensors: {', '.join(names[:5])}{', ...' if names[5:] else ''}",
                where=str(checkpoint.folder),
                fix="merge adapters into the model first (save_pretrained_merged), and save it whole",
            )
    for tensor in tensors:
        shape = checkpoint.shapes[tensor.source]
        if shape != tensor.shape:
            raise WhetError(
                f"{tensor.source} has shape {list(shape)}, but config.json implies {list(tensor.shape)}",
                where=str(checkpoint.folder),
                fix="save model and config together with save_pretrained",
            )
    return tensors


@contextmanager
def _partial_file(out: Path, nbytes: int) -> Iterator[Path]:
    """A file beside `out` that takes its name when the block ends well, and is removed otherwise."""
    partial = out.with_suffix(".gguf.partial")
    needed = f"free {nbytes:,} bytes there, or choose a smaller quantization or another folder"
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise WhetError(f"no space left: {nbytes:,} bytes needed, {free:,} free", where=str(out.parent), fix=needed)
    try:
        yield partial
        os.replace(partial, out)
    except OSError as error:
        raise WhetError(f"the file could not be written: {error}", where=str(out), fix=needed) from error
    finally:
        partial.unlink(missing_ok=True)


def _write(
    path: Path,
    name: str,
    config: LlamaConfig,
    tokenizer: GGUFTokenizer,
    plan: list[_Planned],
    factors: NDArray[np.float32] | None,
    checkpoint: Checkpoint,
    quantization: str,
    progress: Progress | None,
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(QUANTIZATIONS[quantization])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_architecture_metadata(writer, config)
        tokenizer.write(writer)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for planned in plan:
            shape, kind = planned.tensor.shape, planned.type.ggml
            writer.add_tensor_info(planned.tensor.name, shape, np.dtype(np.float32), planned.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        done, total = 0, sum(planned.weights for planned in plan)
        for planned in plan:
            writer.write_tensor_data(_encode(planned, checkpoint))
            done += planned.weights
            if progress:
                progress(done, total, planned.tensor.name)
    finally:
        writer.close()


def _source(tensor: SourceTensor, checkpoint: Checkpoint) -> NDArray[np.float32]:
    """The tensor in float32 and in llama.cpp's row order, as [rows, cols]; a vector is one row."""
    x = checkpoint.read(tensor.source)
    if tensor.heads:
        x = reorder_heads(x, tensor.heads)
    return np.atleast_2d(x)


def _encode(planned: _Planned, checkpoint: Checkpoint) -> NDArray[np.uint8]:
    x = _source(planned.tensor, checkpoint)
    out = np.empty((x.shape[0], planned.type.row_bytes(x.shape[1])), np.uint8)

    def encode(rows: slice) -> None:
        out[rows] = planned.type.encode(x[rows])

    try:
        _on_threads(encode, x.shape)
    except WhetError as error:
        raise WhetError(error.what, where=planned.tensor.source, fix=error.fix) from error
    return out


def _on_threads(work: Callable[[slice], None], shape: tuple[int, int]) -> None:
    """Call `work` for slices of rows, on as many threads as torch would use; numpy releases the GIL."""
    step = max(1, _SHARE // shape[1])
    slices = [slice(start, start + step) for start in range(0, shape[0], step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, slices))  # list: raise what a task raised


def verify(path: Path, model_dir: Path) -> None:
    """Compare a GGUF file with the Hugging Face folder it was made from.

    Every tensor must be there under its name, with its shape, and decode to within its type's error bound of the
    source. Raises WhetError that names the first tensor at fault.
    """
    config = read_config(Path(model_dir))
    with Checkpoint(Path(model_dir)) as checkpoint:
        tensors = {tensor.name: tensor for tensor in _tensors(config, checkpoint)}
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        factors = written.pop(ROPE_FACTORS, None)
        expected_factors = rope_factors(config)
        if (factors is None) != (expected_factors is None):
            raise _mismatch(path, ROPE_FACTORS, "is there without llama3 rope, or missing with it")
        if factors is not None and not np.array_equal(factors.data, expected_factors):
            raise _mismatch(path, ROPE_FACTORS, "differs from config.json's rope parameters")
        for name in tensors.keys() ^ written.keys():
            raise _mismatch(path, name, "is in the one and not in the other")
        for name, tensor in tensors.items():
            _verify_tensor(path, tensor, written[name], checkpoint)


def _verify_tensor(path: Path, tensor: SourceTensor, written: gguf.ReaderTensor, checkpoint: Checkpoint) -> None:
    shape = tuple(int(size) for size in reversed(written.shape))
    if shape != tensor.shape:
        raise _mismatch(path, tensor.name, f"has shape {list(shape)}, the source {list(tensor.shape)}")
    kind = next((kind for kind in TYPES.values() if kind.ggml == written.tensor_type), None)
    if kind is None:
        raise _mismatch(path, tensor.name, f"has type {written.tensor_type.name}, which whet does not write")
    x = _source(tensor, checkpoint)
    data = written.data.view(np.uint8).reshape(x.shape[0], -1)

    def compare(rows: slice) -> None:
        error = np.abs(kind.decode(data[rows]) - x[rows]).reshape(-1, kind.block_size)
        if not (error <= kind.error_bound(x[rows])).all():
            raise _mismatch(path, tensor.name, f"decodes to numbers that are off by up to {error.max():g}")

    _on_threads(compare, x.shape)


def _mismatch(path: Path, name: str, what: str) -> WhetError:
    return WhetError(
        f"the tensor {name} {what}", where=str(path), fix="export again, from the folder the file was made from"
    )
