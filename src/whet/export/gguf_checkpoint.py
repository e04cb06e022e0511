"""Reads the tensors of a safetensors checkpoint, single or sharded, one at a time or some rows of one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from whet.errors import WhetError
from whet.export.json_files import read_json

_FLOATS = {"F64", "F32", "F16", "BF16"}


class Checkpoint:
    """A folder with `model.safetensors`, or `model.safetensors.index.json` and its shards. Use as a context manager.

    shapes: tensor name -> shape. Raises WhetError where files are missing, broken, or hold other than floats.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        with ExitStack() as stack:
            for path in self._paths():
                self._open(path, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """The tensor, or some of its rows, as the file holds it. Only these rows are read."""
        part: torch.Tensor = self._files[name].get_slice(name)[rows]
        return part

    def _paths(self) -> list[Path]:
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return [self.folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        raise WhetError(
            "there is no model.safetensors here, nor an index of shards",
            where=str(self.folder),
            fix="save the model with save_pretrained; pickle checkpoints (.bin, .pt) are not read",
        )

    def _open(self, path: Path, stack: ExitStack) -> None:
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise WhetError(f"the file cannot be read: {error}", where=str(path), fix="save the model again") from error
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
            part = file.get_slice(name)
            if part.get_dtype() not in _FLOATS:
                raise WhetError(
                    f"{name} holds {part.get_dtype()}, not floats: the checkpoint is quantized",
                    where=str(path),
                    fix='save it with save_method="merged_16bit" first',
                )
            self.shapes[name] = tuple(part.get_shape())
            self._files[name] = file
