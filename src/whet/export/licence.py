"""The licence of a base model: its own files where they lie beside it, and the name its model card gives it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

FILES = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-].*)?", re.IGNORECASE)
TEXT = ("", ".txt", ".md", ".rst")
FOLDER = "base-licence"
BUILTIN = "builtin:"


@dataclass(frozen=True)
class Licence:
    """name: as the base's model card says, as "apache-2.0"; None where it says nothing. files: the texts."""

    name: str | None
    files: tuple[Path, ...]

    @property
    def known(self) -> bool:
        return bool(self.name or self.files)

    @property
    def text(self) -> str | None:
        """The licence itself, where there is a file of it."""
        for path in self.files:
            if path.name.lower().startswith("licen"):
                return path.read_text(encoding="utf-8", errors="replace")
        return None

    def copy(self, folder: Path) -> list[Path]:
        """Put the files into `folder/base-licence`."""
        copied = []
        for path in self.files:
            target = folder / FOLDER / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(target)
        return copied


def licence_of(base: str) -> Licence:
    """The licence of a base, by its folder, hub name or `builtin:NAME`. Of a hub name, only the cache is read."""
    if base.startswith(BUILTIN):
        return _own()
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return _cached(base)
    found = sorted(path for path in folder.iterdir() if path.is_file())
    return Licence(_name_in(folder / "README.md"), tuple(path for path in found if _is_licence(path.name)))


def _is_licence(name: str) -> bool:
    return bool(FILES.fullmatch(name)) and Path(name).suffix.lower() in TEXT


def _own() -> Licence:
    """A built-in model is whet's own, under whet's licence."""
    found = [Path(str(file.locate())) for file in metadata.files("whet") or [] if file.name == "LICENSE"]
    return Licence("apache-2.0", tuple(path for path in found if path.is_file()))


def _cached(name: str) -> Licence:
    """What the hub's cache holds of a repository; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    names: Sequence[str] = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
    found = [Path(path) for one in names if isinstance(path := try_to_load_from_cache(name, one), str)]
    card = try_to_load_from_cache(name, "README.md")
    return Licence(_name_in(Path(card)) if isinstance(card, str) else None, tuple(found))


def _name_in(card: Path) -> str | None:
    """`license` of a model card's front matter; `license_name` where that is "other"."""
    if not card.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values: Any = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    name = values.get("license")
    return str(values.get("license_name") or name) if name == "other" else str(name) if name else None
