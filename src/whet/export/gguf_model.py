"""From a model in memory to GGUF files: merge the adapter, then convert the merged folder once for each type."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from whet.errors import WhetError
from whet.export.gguf import write_gguf
from whet.export.gguf_llama import read_config
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.merge import save_merged
from whet.files import refused_when_full

log = logging.getLogger("whet")


def save_gguf(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    quantizations: Sequence[str],
    *,
    base: str = "dequantized",
) -> list[Path]:
    """Write `folder/model-TYPE.gguf` for each type, and return the paths.

    The merge is rounded to 16 bits first, as `merged_16bit` is, so that both hold the same weights; "f32" keeps fp32.
    """
    paths = [folder / f"model-{name}.gguf" for name in quantizations]
    with (
        refused_when_full(folder),
        tempfile.TemporaryDirectory(prefix="whet-", dir=_existing_parent(folder)) as scratch,
    ):
        merged: dict[torch.dtype | None, Path] = {}
        for name, path in zip(quantizations, paths, strict=True):
            dtype = torch.float32 if name == "f32" else None
            if dtype not in merged:
                merged[dtype] = Path(scratch) / str(dtype)
                save_merged(model, merged[dtype], tokenizer, method="merged_16bit", base=base, dtype=dtype)
            folder.mkdir(parents=True, exist_ok=True)
            report = write_gguf(merged[dtype], path, name)
            for tensor, kept in report.fallbacks.items():
                log.warning("%s: %s is held as %s", path.name, tensor, kept)
            for note in report.notes:
                log.warning("%s: %s", path.name, note)
    return paths


def check_convertible(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises WhetError for an architecture or a tokenizer that GGUF cannot hold, before anything is trained."""
    with tempfile.TemporaryDirectory(prefix="whet-") as scratch:
        folder = Path(scratch)
        plain = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        type(config).from_dict(plain).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            read_tokenizer(folder, read_config(folder).vocab)
        except WhetError as error:
            raise WhetError(error.what, where=f"export.gguf, {config._name_or_path}", fix=error.fix) from error


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in folder.absolute().parents if parent.is_dir())
