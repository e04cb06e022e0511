"""Hugging Face data sets: a folder that `save_to_disk` wrote, or one of the hub by name.

Only the latter goes to the network, and not with HF_HUB_OFFLINE=1, where it must be in the cache already. No code of a
data set is run (`datasets` has dropped loading scripts); pictures and sound stay undecoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.data.read.piece import Piece, Row, cannot_open, column_names
from whet.errors import WhetError

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

BATCH = 1000  # rows
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_data_set(path: Path) -> bool:
    """Whether it is a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    try:
        return (path / "dataset_dict.json").is_file() or _is_one_split(path)
    except (OSError, ValueError):  # names that are too long or hold a null: the search for files reports them
        return False


def data_set_piece(folder: Path, source: str, split: str | None) -> Piece:
    """Raises WhetError when the folder has several splits and none is asked for, or another than it has."""
    if _is_one_split(folder):
        if split is not None:
            raise WhetError("the data set was saved without splits", where=source, fix="remove split")
        return Piece("dataset", source, (str(folder.absolute()),))
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        name = _chosen(list(map(str, splits)), split, source)
    except OSError as error:
        raise cannot_open(source, error) from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, WhetError):
            raise
        raise _damaged("dataset_dict.json lists no splits", source) from error
    if not re.fullmatch(r"\w+([.-]\w+)*", name):
        raise _damaged("a split's name is no name", source)
    return Piece("dataset", source, (str((folder / name).absolute()),), split=name)


def hub_piece(name: str, split: str | None, config: str | None, revision: str | None) -> Piece:
    """Raises WhetError for what is no name on the hub."""
    if not _NAME.fullmatch(name):
        raise WhetError(f"{name!r} is no name of a data set", where="hub", fix="write owner/name, as the hub shows it")
    if Path(name).exists():  # `datasets` would take the folder
        raise WhetError(f"{name!r} is a path here", where="hub", fix=f"write path: {name}, or run in another folder")
    return Piece("hub", f"hub:{name}", split=split, config=config, revision=revision)


def read_data_set(piece: Piece) -> Iterator[Row | WhetError]:
    return _rows(open_data_set(piece), piece)


def read_hub(piece: Piece) -> Iterator[Row | WhetError]:
    return _rows(open_data_set(piece), piece)


def open_data_set(piece: Piece) -> Dataset:
    """The split, memory-mapped. Of the hub: downloaded to the cache where it is not there yet."""
    from datasets import Dataset, load_from_disk

    if piece.kind == "hub":
        return _of_hub(piece)
    try:
        if not json.loads((piece.path / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            return Dataset.from_dict({})  # `datasets` saves a set without rows so, and cannot load it
        return load_from_disk(piece.paths[0], keep_in_memory=False)
    except PermissionError as error:
        raise cannot_open(piece.source, error) from error
    except Exception as error:  # json's, Arrow's and its own errors, whatever the damage leads to
        raise _damaged(_first_line(error), piece.source) from error


def _of_hub(piece: Piece) -> Dataset:
    from datasets import load_dataset
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name = piece.source.removeprefix("hub:")
    try:
        # Not `load_dataset(name)`, which reports each load to a server that counts them.
        folder = snapshot_download(name, repo_type="dataset", revision=piece.revision)
        loaded = load_dataset(folder, piece.config, keep_in_memory=False)
    except (ConnectionError, LocalEntryNotFoundError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise WhetError(
            f"the hub is not reached{offline}, and the cache has no such data set",
            where=piece.source,
            fix="download it where there is a network, save_to_disk there, and give the folder as path",
        ) from error
    except Exception as error:  # of three libraries
        fix = "check name, config, revision, and HF_TOKEN for private ones"
        raise WhetError(_first_line(error), where=piece.source, fix=fix) from error
    return loaded[_chosen(list(loaded), piece.split, piece.source)]


def _rows(data: Dataset, piece: Piece) -> Iterator[Row | WhetError]:
    import pyarrow as pa  # type: ignore[import-untyped]

    column_names(list(data.column_names), piece.source)
    number = piece.line
    stop = len(data) if piece.stop is None else min(piece.stop, len(data))
    try:
        part = data.with_format("arrow")
        for start in range(piece.start, stop, BATCH):
            table: Any = part[start : min(start + BATCH, stop)]
            for values in table.to_pylist():
                yield Row(values, piece.source, number)
                number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(_first_line(error), piece.source) from error


def _is_one_split(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _chosen(splits: list[str], wanted: str | None, source: str) -> str:
    if wanted is None and len(splits) == 1:
        return splits[0]
    if wanted not in splits:
        what = "the data set has several splits" if wanted is None else f"the data set has no split {wanted!r}"
        raise WhetError(
            what,
            where=source,
            fix=f"write split: {splits[0] if splits else 'NAME'}; it has {', '.join(splits) or 'none'}",
        )
    return wanted


def _damaged(what: str, source: str) -> WhetError:
    return WhetError(
        f"not readable as a saved data set: {what}", where=source, fix="save it again with Dataset.save_to_disk"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
