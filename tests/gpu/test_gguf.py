"""GGUF files encoded on the GPU."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tests.export.tiny_llama import byte_level_tokenizer, save_llama
from whet.export.gguf import verify, write_ggufs
from whet.export.imatrix import Imatrix
from whet.quant.gguf_mixes import MIXES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_the_gpu_writes_what_the_cpu_writes(guided: bool, tmp_path: Path) -> None:
    """Catches rows of q and k that change places only on one of the two, and a search that goes astray on the GPU.

    Sums run in another order there, so a level may differ: files are as close to the source, not the same.
    """
    folder = save_llama(tmp_path / "model", byte_level_tokenizer())
    names = {f"blk.{layer}.attn_q.weight": np.linspace(0.1, 2, 256, dtype=np.float32) for layer in range(2)}
    imatrix = Imatrix(names, dict.fromkeys(names, 1), 1, 1) if guided else None
    cpu = write_ggufs(folder, {n: tmp_path / f"{n}-cpu.gguf" for n in MIXES}, imatrix=imatrix, device="cpu")
    gpu = write_ggufs(folder, {n: tmp_path / f"{n}-gpu.gguf" for n in MIXES}, imatrix=imatrix, device="cuda")
    (exact,) = write_ggufs(folder, {"f32": tmp_path / "f32.gguf"}, device="cpu")
    sources = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(exact.path).tensors}
    for one, other in zip(cpu, gpu, strict=True):
        assert (one.types, one.nbytes) == (other.types, other.nbytes)
        verify(other.path, folder, "cpu")
        verify(one.path, folder, "cuda")
        for left, right in zip(gguf.GGUFReader(one.path).tensors, gguf.GGUFReader(other.path).tensors, strict=True):
            decoded = [dequantize(tensor.data, tensor.tensor_type) for tensor in (left, right)]
            losses = [float(np.square(x - sources[left.name]).mean()) for x in decoded]
            assert abs(losses[0] - losses[1]) <= 1e-3 * max(losses), (one.quantization, left.name)
