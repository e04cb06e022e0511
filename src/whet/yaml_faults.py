"""A YAML file with the line of every key, and pydantic's complaints about it in a user's words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whet.errors import WhetError, WhetErrors

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class Kind:
    """Of file. name: as in "there is no such NAME". begin: what such a file starts with. keys: where all are listed."""

    name: str
    begin: str
    keys: str


@dataclass(frozen=True)
class Document:
    """What a YAML file says, and on which line each of its keys and list items stands.

    above: where `values` stands in the file, when it is a section of it.
    """

    path: Path
    values: dict[str, Any]
    lines: dict[Loc, int]
    kind: Kind
    above: Loc = ()

    def under(self, *loc: str | int) -> Document:
        """The section at `loc`, as a document whose places are still those in the file."""
        values: Any = self.values
        for part in loc:
            values = values[part]
        return replace(self, values=values, above=(*self.above, *loc))

    def holds(self, loc: Loc) -> bool:
        """Whether the file has a line for this key."""
        return (*self.above, *loc) in self.lines

    def where(self, loc: Loc) -> str:
        """`file:line: section.key`, by the nearest key above that is written in the file."""
        loc = (*self.above, *loc)
        line = next((self.lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self.lines), 1)
        return f"{self.path}:{line}: {'.'.join(map(str, loc)) or self.kind.name}"


def read_yaml(path: Path, kind: Kind) -> Document:
    """Raises WhetError when the file can't be read, is not a YAML mapping, or says a key twice."""
    text = _read(path, kind)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        lines: dict[Loc, int] = {}
        repeated = list(_walk(node, (), lines, path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not readable"
        fix = "check the indentation and quotes on this line"
        raise WhetError(f"not valid YAML: {problem}", where=where, fix=fix) from None
    except (ValueError, RecursionError) as error:  # a date such as 2001-99-99; a mapping inside itself
        fix = "put the value in quotes, and let no section contain itself"
        raise WhetError(f"a value that YAML cannot read: {error}", where=str(path), fix=fix) from None
    if not isinstance(node, yaml.MappingNode):
        raise WhetError(f"a {kind.name} is a mapping of sections", where=str(path), fix=f"start with {kind.begin}")
    if repeated:
        raise WhetErrors(repeated)
    return Document(path, values, lines, kind)


def _read(path: Path, kind: Kind) -> str:
    if path.is_dir():
        raise WhetError("this is a folder", where=str(path), fix=f"name the {kind.name} file in it")
    if not path.exists():
        near = sorted(str(p) for p in path.parent.glob("*.y*ml"))[:5]
        fix = f"use one of: {', '.join(near)}" if near else "check the path"
        raise WhetError(f"there is no such {kind.name}", where=str(path), fix=fix)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise WhetError(f"not UTF-8 text at byte {error.start}", where=str(path), fix="save it as UTF-8") from None
    except PermissionError:
        raise WhetError("not allowed to read this file", where=str(path), fix="check its permissions") from None


def _walk(node: yaml.Node | None, loc: Loc, lines: dict[Loc, int], path: Path) -> Iterator[WhetError]:
    """Record the lines under a node; yields an error for each repeated key, of which YAML would drop one in silence."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here, line = (*loc, key.value), key.start_mark.line + 1
            if here in lines:
                yield WhetError(f"the key {key.value!r} stands here twice", where=f"{path}:{line}", fix="keep one")
            lines[here] = line
            yield from _walk(value, here, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*loc, i)] = value.start_mark.line + 1
            yield from _walk(value, (*loc, i), lines, path)


def explain(fault: Any, root: type[BaseModel], document: Document) -> WhetError:
    """One of pydantic's error records as line, field, what is wrong, and what to type."""
    loc = _written(fault["loc"], root, document.values)
    where, given, message = document.where(loc), fault.get("input"), fault["msg"]
    match fault["type"]:
        case "extra_forbidden":
            return WhetError("unknown key", where=where, fix=_nearest(str(loc[-1]), list(_fields(loc[:-1], root))))
        case "model_type":
            keys = ", ".join(section.model_fields) if (section := section_at(loc, root)) else ""
            return WhetError(f"this is a section of keys, not {given!r}", where=where, fix=f"use the keys {keys}")
        case "missing":
            return WhetError("this key is required", where=where, fix=f"{loc[-1]}: {_help(loc, root, document)}")
        case "literal_error":
            choices = fault["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return WhetError(f"{given!r} is not a choice", where=where, fix=_nearest(str(given), choices))
        case "value_error":
            what, _, fix = message.removeprefix("Value error, ").rpartition("; ")
            named: Loc = tuple(what.split(" ", 1)[0].split("."))
            return WhetError(what, where=document.where(named) if document.holds(named) else where, fix=fix)
        case _:
            what = f"{message[0].lower()}{message[1:]}, not {given!r}"
            return WhetError(what, where=where, fix=_help(loc, root, document))


def _written(loc: Loc, root: type[BaseModel], values: Any) -> Loc:
    """pydantic's location without the parts it adds for the members of a union: keys of the file or the model only."""
    kept: list[str | int] = []
    for part in loc:
        inside = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if inside or (isinstance(values, dict) and part in values):
            values = values[part]
        elif part not in _fields(tuple(kept), root):
            continue
        kept.append(part)
    return tuple(kept)


def _nearest(given: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(given, choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(choices)}"


def _help(loc: Loc, root: type[BaseModel], document: Document) -> str:
    field = _fields(loc[:-1], root).get(str(loc[-1])) if loc else None
    return (field.description if field else None) or document.kind.keys


def _fields(loc: Loc, root: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of the section that a location leads to."""
    section = section_at(loc, root)
    return {field.alias or name: field for name, field in section.model_fields.items()} if section else {}


def section_at(loc: Loc, root: type[BaseModel]) -> type[BaseModel] | None:
    """The section that a location leads to; None for a plain value."""
    section: type[BaseModel] | None = root
    for part in loc:
        if section is None or isinstance(part, int):
            continue
        field = section.model_fields.get(part)
        section = section_of(field.annotation) if field else None
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `Adapter | None` or `list[Source]`; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := section_of(arg))), None)
