"""The weights of a model's folder by the names they have in the model, read some rows at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from whet.errors import WhetError
from whet.export.merge_files import NAMES, TensorFiles, first_axis

# Files of a model that also reads images -> its parts in transformers, which takes both.
RENAMED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


class Checkpoint:
    """A folder with `model.safetensors`, or `model.safetensors.index.json` and its shards.

    shapes: name -> shape. Raises WhetError where files are missing, broken, or hold other than floats of 16 bits or
    more. Host memory: the rows that were asked for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = TensorFiles(folder)
        self._stored = {_name_in_model(name): name for name in self._files}
        self.shapes = {name: self._files.part(stored).shape for name, stored in self._stored.items()}
        for stored in self._files:
            self._check_floats(stored)

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor, or some of its rows, as the file holds it."""
        start, stop, _ = rows.indices(first_axis(self.shapes[name]))
        return self._files.rows(self._stored[name], start, stop)

    def _check_floats(self, stored: str) -> None:
        dtype = self._files.part(stored).dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise WhetError(
                f"{stored} holds {NAMES[dtype]}, not floats: the checkpoint is quantized",
                where=str(self._files.places[stored].path),
                fix='save it with save_method="merged_16bit" first',
            )


def _name_in_model(stored: str) -> str:
    for prefix, renamed in RENAMED.items():
        if stored.startswith(prefix):
            return renamed + stored.removeprefix(prefix)
    return stored
