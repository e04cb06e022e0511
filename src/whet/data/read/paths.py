"""From a path, a glob or a folder to files, in the order of their names on every machine."""

from __future__ import annotations

import difflib
import glob
import os
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from whet.data.read.piece import COMPRESSED, cannot_open
from whet.errors import WhetError

GLOB_CHARACTERS = "*?["


def kind_of(name: str) -> str:
    """The extension in small letters, with the one before it where the file is compressed: ".jsonl.gz"."""
    path = Path(name.lower())
    return Path(path.stem).suffix + path.suffix if path.suffix in COMPRESSED else path.suffix


def matching_files(
    pattern: str, base: Path, kinds: Collection[str], *, skip_others: bool = False
) -> list[tuple[Path, str]]:
    """(path to open, name to show) of the files that match, in the order of their names.

    Of a folder, every file in it and in the folders below, but for hidden ones. There, files of other kinds than
    `kinds` are a fault, or left out with `skip_others`; files that a path or a glob names are all returned.
    Raises WhetError when no file matches, or a folder cannot be searched.
    """
    if not pattern.strip():
        raise WhetError("the path is empty", where="path", fix="name a file, a folder (. for this one) or a pattern")
    pattern = str(Path(os.path.expanduser(pattern)))
    try:
        if (base / pattern).is_dir():
            return _of_known_kind(_files_below(pattern, base), pattern, kinds, skip_others)
        # A file whose own name holds glob characters is meant literally.
        names = [pattern] if (base / pattern).is_file() else glob.glob(pattern, root_dir=base, recursive=True)
        found = sorted((Path(name).as_posix(), base / name) for name in names if (base / name).is_file())
        if not found:
            raise WhetError(f"no file matches {pattern!r} in {base}", where=pattern, fix=_near_matches(pattern, base))
    except OSError as error:  # a folder that may not be entered, a name too long
        raise cannot_open(pattern, error) from error
    except ValueError as error:  # a null character
        if isinstance(error, WhetError):
            raise
        raise WhetError(f"no path: {error}", where=repr(pattern), fix="check the path") from error
    return [(path, name) for name, path in found]


def _files_below(folder: str, base: Path) -> Iterator[tuple[str, Path]]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(base / folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent) / name
            if not name.startswith(".") and path.is_file():
                yield (Path(folder) / path.relative_to(base / folder)).as_posix(), path


def _of_known_kind(
    found: Iterator[tuple[str, Path]], folder: str, kinds: Collection[str], skip_others: bool
) -> list[tuple[Path, str]]:
    files = sorted(found)
    others = [name for name, _ in files if kind_of(name) not in kinds]
    if others and not skip_others:
        count = Counter(kind_of(name) or "no extension" for name in others)
        raise WhetError(
            f"the folder holds {len(others)} of {len(files)} files of kinds that cannot be read: "
            f"{', '.join(f'{kind} ({n})' for kind, n in sorted(count.items())[:10])}; the first is {others[0]}",
            where=folder,
            fix=f"set skip_unreadable: true, convert them, or name the others, as {folder}/**/*.md",
        )
    readable = [(path, name) for name, path in files if kind_of(name) in kinds]
    if not readable:
        raise WhetError("the folder holds no file that can be read", where=folder, fix=f"it may hold {_list(kinds)}")
    return readable


def unknown_kind(name: str, kinds: Collection[str]) -> WhetError:
    return WhetError(
        f"cannot tell what kind of file {kind_of(name) or 'a name without extension'} is",
        where=name,
        fix=f"convert it to one of {_list(kinds)}, or narrow the pattern",
    )


def _list(kinds: Collection[str]) -> str:
    """The kinds in few words."""
    plain = [kind for kind in kinds if not kind.endswith(COMPRESSED)]
    return f"{', '.join(plain)} (text also with {' or '.join(COMPRESSED)})"


def _near_matches(pattern: str, base: Path) -> str:
    """What to type instead of a pattern that matches nothing: the nearest names in the nearest folder that exists."""
    folder = base / pattern
    while not folder.is_dir() or any(character in str(folder) for character in GLOB_CHARACTERS):
        if folder == folder.parent:
            return "check the path"
        folder = folder.parent
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    wanted = (base / pattern).relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5) or names[:5]
    if not near:
        return f"the folder {folder} is empty; check the path"
    return f"check the path; {folder} holds {', '.join(near)}"
