"""From a model in memory to GGUF files: merge the adapter, then convert the merged folder to every type in one pass."""

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
from whet.export.gguf import GGUFReport, write_ggufs
from whet.export.gguf_architectures import architecture_of
from whet.export.gguf_tokenizer import read_tokenizer
from whet.export.imatrix import Imatrix
from whet.export.merge import save_merged
from whet.files import refused_when_full
from whet.quant.gguf_mixes import check_quantization

log = logging.getLogger("whet")


def save_gguf(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    quantizations: Sequence[str],
    *,
    base: str = "dequantized",
    imatrix: Imatrix | None = None,
) -> list[Path]:
    """Write `folder/model-TYPE.gguf` for each type, and return the paths. imatrix: see `write_ggufs`.

    The merge is rounded to 16 bits first, as `merged_16bit` is, so that both hold the same weights; "f32" keeps fp32.
    """
    for name in quantizations:
        check_quantization(name)
    paths = {name: folder / f"model-{name}.gguf" for name in quantizations}
    exact = {name: path for name, path in paths.items() if name == "f32"}
    rounded = {name: path for name, path in paths.items() if name != "f32"}
    for dtype, files in ((torch.float32, exact), (None, rounded)):
        if files:
            with (
                refused_when_full(folder),
                tempfile.TemporaryDirectory(prefix="whet-", dir=_existing_parent(folder)) as scratch,
            ):
                merged = Path(scratch) / folder.absolute().name
                save_merged(model, merged, tokenizer, method="merged_16bit", base=base, dtype=dtype)
                for report in write_ggufs(merged, files, imatrix=imatrix):
                    _warn(report)
    return list(paths.values())


def _warn(report: GGUFReport) -> None:
    """Say what was done otherwise than asked."""
    for tensor, kept in report.fallbacks.items():
        log.warning("%s: %s is held as %s", report.path.name, tensor, kept)
    for note in report.notes:
        log.warning("%s: %s", report.path.name, note)


def check_convertible(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises WhetError for an architecture or a tokenizer that GGUF cannot hold, before anything is trained."""
    with tempfile.TemporaryDirectory(prefix="whet-") as scratch:
        folder = Path(scratch)
        plain = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
        type(config).from_dict(plain).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            read_tokenizer(folder, architecture_of(folder).config.vocab)
        except WhetError as error:
            raise WhetError(error.what, where=f"export.gguf, {config._name_or_path}", fix=error.fix) from error


def _existing_parent(folder: Path) -> Path:
    return next(parent for parent in folder.absolute().parents if parent.is_dir())
