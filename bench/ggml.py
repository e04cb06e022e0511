"""llama.cpp's own quantizer, called through ctypes: what whet's block formats are compared with.

The shared library is the one that node-llama-cpp brings (`whet.export.llama_cpp.install` puts it under `.node`); its
base library holds the quantizers for every processor. Only benchmarks and the writer of the tests' fixtures use it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / ".node/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/libggml-base.so"
RELEASE = ROOT / ".node/node_modules/node-llama-cpp/llama/binariesGithubRelease.json"


class GGML:
    """The library, loaded. Raises OSError where it is not installed."""

    def __init__(self, path: Path = LIBRARY):
        self._library = ctypes.CDLL(str(path))
        self._quantize = self._library.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        self._quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantize(
        self, kind: GGMLQuantizationType, x: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Encode x [rows, cols], with importance [cols] where given -> [rows, bytes]. Releases the GIL."""
        x = np.ascontiguousarray(x, np.float32)
        rows, cols = x.shape
        block, nbytes = GGML_QUANT_SIZES[kind]
        out = np.empty((rows, cols // block * nbytes), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        pointer = None if weights is None else weights.ctypes.data
        written = self._quantize(int(kind), x.ctypes.data, out.ctypes.data, 0, rows, cols, pointer)
        assert written == out.nbytes, (kind, written, out.nbytes)
        return out
