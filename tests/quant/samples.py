"""Weights that the tests of block formats share, and what llama.cpp's quantizer makes of them (fixtures/write.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from whet.quant.gguf_types import GGUFType
from whet.quant.kernels import compiled

Floats = NDArray[np.float32]

_FOLDER = Path(__file__).parent / "fixtures"
_ARRAYS = np.load(_FOLDER / "blocks.npz", allow_pickle=False)
LLAMA_CPP_RMSE: dict[str, float] = json.loads((_FOLDER / "errors.json").read_text(encoding="utf-8"))["weighted_rmse"]
SOURCES: dict[str, Floats] = {
    name: _ARRAYS[name].astype(np.float32) for name in _ARRAYS.files if "/" not in name and name != "importance"
}
IMPORTANCE: Floats = _ARRAYS["importance"]


def llama_cpp_bytes(key: str) -> NDArray[np.uint8]:
    """What llama.cpp wrote for the first rows of a source: `source/type` or `source/type/guided`."""
    return _ARRAYS[key]


def weighted_rmse(kind: GGUFType, x: Floats, importance: Floats | None) -> float:
    """Root-mean-square error of x encoded and decoded, each column's square times its importance."""
    error = (kind.decode(encode_compiled(kind, x, importance)) - x).astype(np.float64)
    weight = 1.0 if importance is None else importance
    return float(np.sqrt((weight * error**2).mean()))


def encode_compiled(kind: GGUFType, x: Floats, importance: Floats | None = None) -> NDArray[np.uint8]:
    """By the compiled kernels, which a process of a test would otherwise come to late or never."""
    return kind.encode(x, importance, compiled())


def encode_by_torch(kind: GGUFType, x: Floats, importance: Floats | None = None) -> NDArray[np.uint8]:
    h = None if importance is None else torch.from_numpy(importance)
    return kind.encode_torch(torch.from_numpy(x), h).numpy()
