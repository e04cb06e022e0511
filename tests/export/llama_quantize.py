"""llama.cpp's own quantizer, called through ctypes in the library that npm's package brings.

`quantize` runs it in a process of its own, which an assertion in it may end.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import LlamaFileType

from whet.export import llama_cpp


@dataclass(frozen=True)
class Job:
    """Quantize the GGUF `source` (F32) to `out`. imatrix: tensor name -> importance [cols]."""

    source: Path
    out: Path
    file_type: LlamaFileType
    imatrix: Mapping[str, np.ndarray] = field(default_factory=dict)


def quantize(jobs: Sequence[Job], scratch: Path) -> list[bool]:
    """Run the jobs, and say of each whether llama.cpp did it. scratch: an empty folder."""
    lines = []
    for number, job in enumerate(jobs):
        columns = scratch / f"{number}.npz"
        np.savez(columns, **job.imatrix)
        lines.append([str(job.source), str(job.out), int(job.file_type), str(columns)])
    (scratch / "jobs.json").write_text(json.dumps(lines))
    command = [sys.executable, __file__, str(_library()), str(scratch / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"llama_model_quantize ended its process:\n{done.stderr[-3000:]}"
    return [code == 0 for code in json.loads(done.stdout.splitlines()[-1])]


def _library() -> Path:
    folder = llama_cpp.find()
    assert folder, "llama.cpp is not installed"
    return next(folder.glob("node_modules/@node-llama-cpp/*/bins/*/libllama.*"))


class _Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params of llama.h, release v0.5.0."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("room", ctypes.c_byte * 64),  # a later release may have more fields
    )


def _main(library: str, jobs: str) -> None:
    folder = Path(library).parent
    for name in ("libggml-base", "libggml"):  # what libllama needs, from its own folder
        ctypes.CDLL(str(next(folder.glob(f"{name}.*"))), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _Parameters
    print(json.dumps([_quantize(llama, *job) for job in json.loads(Path(jobs).read_text())]))


def _quantize(llama: ctypes.CDLL, source: str, out: str, file_type: int, imatrix: str) -> int:
    parameters = llama.llama_model_quantize_default_params()
    assert parameters.quantize_output_tensor, "llama_model_quantize_params has another layout"
    parameters.nthread, parameters.ftype = 1, file_type
    with np.load(imatrix) as arrays:
        columns = {name: np.ascontiguousarray(arrays[name], np.float32) for name in arrays}
    if columns:
        entries = [
            _Importance(name.encode(), x.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), x.size)
            for name, x in columns.items()
        ]
        parameters.imatrix = (_Importance * (len(entries) + 1))(*entries)  # the last, without a name, ends it
    return int(llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
