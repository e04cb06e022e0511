"""What GGUF files will hold: the tensors of a checkpoint, checked against its config, and the type each file gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from whet.errors import WhetError
from whet.export.gguf_architectures import Architecture, SourceTensor
from whet.export.gguf_checkpoint import Checkpoint
from whet.quant.gguf_mixes import ModelFacts, fitting_type, wanted_type
from whet.quant.gguf_types import TYPES, GGUFType


@dataclass(frozen=True)
class FilePlan:
    """One file to be. types: of each tensor, in the order of the file. fallbacks: tensor name -> why its type is not
    the one the quantization asks for."""

    path: Path
    quantization: str
    tensors: list[SourceTensor]
    types: list[GGUFType]
    fallbacks: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(tensor, kind) for tensor, kind in zip(self.tensors, self.types, strict=True))


def weights_of(tensor: SourceTensor) -> int:
    """Numbers in a tensor."""
    return math.prod(tensor.shape)


def tensor_bytes(tensor: SourceTensor, kind: GGUFType) -> int:
    """Bytes of a tensor in a type."""
    *rows, cols = tensor.shape
    return math.prod(rows) * kind.row_bytes(cols)


def plan_file(
    path: Path, quantization: str, architecture: Architecture, tensors: list[SourceTensor], imatrix: bool
) -> FilePlan:
    """The types of `tensors` under a quantization. imatrix: an importance matrix guides the rounding."""
    config = architecture.config
    facts = ModelFacts(
        architecture.gguf_name, config.layers, config.heads, config.kv_heads, config.tied, imatrix=imatrix
    )
    types, fallbacks = [], {}
    for tensor in tensors:
        cols = tensor.shape[-1]
        wanted = wanted_type(quantization, tensor.name, len(tensor.shape), facts)
        chosen = fitting_type(wanted, cols)
        if chosen != wanted:
            fallbacks[tensor.name] = (
                f"{chosen} instead of {wanted}: rows of {cols} weights do not divide into blocks of "
                f"{TYPES[wanted].block_size}"
            )
        types.append(TYPES[chosen])
    return FilePlan(path, quantization, tensors, types, fallbacks)


def checked_tensors(architecture: Architecture, checkpoint: Checkpoint) -> list[SourceTensor]:
    """The model's tensors, checked against those of the checkpoint: none missing, none left over, every shape right."""
    tensors = architecture.expected_tensors()
    # lm_head.weight of a tied model is a copy of the embedding; inv_freq is a buffer of old checkpoints.
    known = {tensor.source for tensor in tensors} | ({"lm_head.weight"} if architecture.config.tied else set())
    others = [name for name in checkpoint.shapes if name not in known and not name.startswith(architecture.left_out)]
    unknown = [name for name in others if not name.endswith("rotary_emb.inv_freq")]
    missing = [tensor.source for tensor in tensors if tensor.source not in checkpoint.shapes]
    for fault, names in (
        ("lacks", missing),
        (f"holds, but GGUF's {architecture.gguf_name} has no place for,", unknown),
    ):
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
