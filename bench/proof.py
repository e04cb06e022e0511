"""How far each format's export lies from the tuned model, by whet's own proof -> bench/results/proof.jsonl.

    PYTHONPATH=src:. python bench/proof.py [--formats q8_0 q4_k_m] [--out bench/results/proof.jsonl]

builtin:tiny with an adapter of rank 8, asked whet's general prompts. Each line also says how far the base lies, and
what share of the adapter the proof finds where it was merged at half its scale: the fault that a coarse format hides
best. `adapter` is the adapter alone as GGUF. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from environment import ROOT, origin
from peft.tuners.lora import LoraLayer

from whet import FastLanguageModel
from whet.export.artifacts import METHODS
from whet.export.gguf import write_gguf
from whet.export.gguf_adapter import write_gguf_adapter
from whet.export.merge import save_merged
from whet.export.merge_formats import FLOATS
from whet.export.proof import Proof, Reference, prove_adapter, prove_folder, prove_gguf
from whet.export.proof.folder import MergedFolder
from whet.export.proof.gguf_file import GGUFFile
from whet.export.proof.limits import limits_of
from whet.export.proof.prompts import general_prompts
from whet.export.proof.share import Layers, share_checks
from whet.quant.gguf_mixes import MIXES

FOLDERS = (*FLOATS, *METHODS)
GGUFS = tuple(name for name in MIXES if name not in FOLDERS)
"""BF16 is measured as a folder."""
ADAPTER = "adapter"
PROMPTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="*", default=[ADAPTER, *FOLDERS, *GGUFS])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "proof.jsonl")
    asked = parser.parse_args()
    reference = tuned()
    where = origin("gguf")
    with tempfile.TemporaryDirectory() as scratch, open(asked.out, "w", encoding="utf-8") as out:
        for format in asked.formats:
            line = measured(reference, format, Path(scratch))
            print(line, flush=True)
            out.write(json.dumps(line | where) + "\n")
            out.flush()


def tuned() -> Reference:
    """An adapter whose B is random instead of zero, so that it changes every layer."""
    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Reference.of(model, tokenizer, general_prompts(tokenizer)[:PROMPTS])


def measured(reference: Reference, format: str, scratch: Path) -> dict[str, Any]:
    start = processor_seconds()
    proof = prove(reference, format, scratch)
    found = {check.name: check for check in proof.checks}
    return {
        "kind": "proof",
        "format": format,
        "engine": proof.engine,
        "passed": proof.passed,
        "kl": found["KL a token"].value,
        "tail": found["KL, tail"].value,
        "top1": found["top-1"].value,
        "parting": found["greedy answers"].value,
        "share": found["adapter's share"].value,
        "share_at_half": share_at_half(reference, format, scratch),
        "base_kl": reference.base_kl,
        "tokens": proof.measures["tokens compared"],
        "processor_seconds": round(processor_seconds() - start, 1),
    }


def processor_seconds() -> float:
    """Of this process and of llama.cpp's, which have ended."""
    return sum(os.times()[:4])


def prove(reference: Reference, format: str, scratch: Path) -> Proof:
    if format == ADAPTER:
        return prove_adapter(reference, *adapter(reference, scratch))
    if format in FOLDERS:
        return prove_folder(reference, merged(reference, format, scratch), format)
    source = merged(reference, "fp32" if format == "f32" else "bf16", scratch)
    path = scratch / f"{format}.gguf"
    write_gguf(source, path, format, check=False)
    return prove_gguf(reference, path, format, source)


def share_at_half(reference: Reference, format: str, scratch: Path) -> float | None:
    """What the proof finds of an adapter that was merged at half its scale; None where it sees nothing wrong, or there
    is no merge."""
    if format == ADAPTER:
        return None
    (check,) = share_checks(reference, halved(reference, format, scratch), limits_of(format))
    return None if check.passed else check.value


def halved(reference: Reference, format: str, scratch: Path) -> Layers:
    """An artifact in which the adapter is at half its scale."""
    with scaled(reference.model, lambda scale: scale / 2):
        source = merged(reference, format if format in FOLDERS else "bf16", scratch, "half-")
    if format in FOLDERS:
        return MergedFolder(source, format, reference)
    path = scratch / f"half-{format}.gguf"
    write_gguf(source, path, format, check=False)
    return GGUFFile(path, format, reference, source)


def merged(reference: Reference, format: str, scratch: Path, prefix: str = "") -> Path:
    path = scratch / f"{prefix}{format}"
    if not path.exists():
        method = METHODS.get(format, "merged_16bit")
        save_merged(reference.model, path, reference.tokenizer, method=method, dtype=FLOATS.get(format))
    return path


def adapter(reference: Reference, scratch: Path) -> tuple[Path, Path, Path]:
    """The adapter as GGUF, the base as F32 GGUF, and the folder of the base."""
    path, base = scratch / "adapter.gguf", scratch / "base.gguf"
    with scaled(reference.model, lambda scale: 0.0):
        folder = merged(reference, "fp32", scratch, "base-")
    reference.model.save_pretrained(scratch / "saved", save_embedding_layers=False)
    write_gguf_adapter(scratch / "saved", folder, path)
    write_gguf(folder, base, "f32", check=False)
    return path, base, folder


@contextmanager
def scaled(model: Any, scale: Callable[[float], float]) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer, values in zip(layers, before, strict=True):
        layer.scaling.update({name: scale(value) for name, value in values.items()})
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.scaling.update(values)


if __name__ == "__main__":
    main()
