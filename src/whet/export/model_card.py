"""README.md of an export: a model card that says what the model is, what it came from, and what was proven of it.

The front matter is the one that model hubs read. Nothing of the data itself is in it: digests, counts and scores alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from whet.export.licence import FOLDER, Licence
from whet.export.proof.checks import Proof
from whet.files import write_text
from whet.pages.numbers import compact, size_of

NAME = "README.md"
TEMPLATE = "model_card.md.jinja"


@dataclass(frozen=True)
class Section:
    """A part of the card: rows of a name and a value."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Origin:
    """Where a model comes from. name: what it is called. base: the base as readers know it: a hub name, or a folder's
    last name. sections: what is known of its run: data, training, evaluation, machine."""

    name: str
    base: str
    licence: Licence
    sections: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A part of an export that an engine loads. path: in the export's folder. kind: "merged" or "gguf". notes: what its
    engine may do differently."""

    path: str
    kind: str
    format: str
    nbytes: int
    notes: tuple[str, ...] = ()


def write_card(
    folder: Path,
    origin: Origin,
    artifacts: Sequence[Artifact],
    proofs: Sequence[Proof],
    *,
    prompts: str,
    modelfiles: dict[str, str],
    fingerprint: dict[str, str],
    notes: Sequence[str],
) -> None:
    """Write `folder/README.md`.

    prompts: which prompts answers were compared on, in words; empty where nothing was proven. modelfiles: of each GGUF
    file that has one. notes: what a user of any artifact must know.
    """
    values: dict[str, Any] = {
        "front_matter": _front_matter(origin),
        "origin": origin,
        "artifacts": artifacts,
        "proofs": [(proof, {check.name: check for check in proof.checks}) for proof in proofs],
        "prompts": prompts,
        "modelfiles": modelfiles,
        "fingerprint": fingerprint,
        "notes": notes,
        "merged": next((one for one in artifacts if one.kind == "merged"), None),
        "licence_folder": FOLDER,
        "size_of": size_of,
        "compact": compact,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown, not HTML; `cell` keeps a table whole
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    write_text(folder / NAME, environment.get_template(TEMPLATE).render(values))


def _front_matter(origin: Origin) -> str:
    values: dict[str, Any] = {"base_model": origin.base, "pipeline_tag": "text-generation"}
    if origin.licence.name:
        values = {"license": origin.licence.name, **values}
    return yaml.safe_dump({**values, "tags": ["whet", "fine-tuned"]}, sort_keys=False)


def _cell(value: Any) -> str:
    """A value that stays within its table cell."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
