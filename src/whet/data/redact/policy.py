"""A policy: which classes are looked for, and what is done with each. Read from YAML, built-in or a user's own.

    name: our-tickets
    description: Safe Harbor, but e-mail addresses keep apart who wrote.
    extends: hipaa-safe-harbor        # a built-in policy, or a file beside this one
    classes: {EMAIL: pseudonym}       # these come on top; `keep` stops looking for a class
    regions: [US, CA]                 # whose national phone numbers are read, in place of the extended policy's

Every fault of a file and of those that it extends is reported at once, with file, line and key.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field

from whet.data.redact.entities import ENTITIES
from whet.data.redact.regions import REGIONS, check_regions
from whet.data.redact.replace import Mode
from whet.errors import WhetError, WhetErrors

FOLDER = Path(__file__).parent / "policies"
BUILT_IN = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
MODES: tuple[str, ...] = get_args(Mode)


class Policy(BaseModel):
    """What `load_policy` gives: `classes` holds those of the extended policy too, `regions` its own or that one's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="What reports call it.")
    description: str = Field("", description="One sentence saying what it is for.")
    extends: str | None = Field(None, description="A built-in policy or a file, whose classes come first.")
    classes: dict[str, Mode] = Field(default_factory=dict, description="Class -> mode.")
    regions: tuple[str, ...] = Field(REGIONS, description="Countries whose national phone numbers are read.")


def load_policy(name_or_path: str, base: Path) -> Policy:
    """A built-in policy by name, or one in a YAML file; a relative path starts at `base`.

    Raises WhetErrors with every fault of the file and of what it extends.
    """
    reading = _Reading()
    policy = reading.policy(name_or_path, base, where="policy")
    if policy is not None and not reading.faults and not policy.classes:
        fix = "classes: {EMAIL: placeholder}"
        reading.faults.append(WhetError("this policy looks for nothing", where=f"{name_or_path}: classes", fix=fix))
    if policy is None or reading.faults:
        raise WhetErrors(reading.faults)
    return policy


def with_classes(policy: Policy, classes: Mapping[str, str], *, where: str = "redact.classes") -> Policy:
    """The policy with these classes -> modes on top. Raises WhetErrors for classes and modes that there are not."""
    faults: list[WhetError] = []
    sound = _sound(classes, lambda entity: f"{where}.{entity}", faults)
    if faults:
        raise WhetErrors(faults)
    return policy.model_copy(update={"classes": {**policy.classes, **sound}})


@dataclass
class _Reading:
    """One policy's file and those that it extends: the way so far, to see a circle, and the faults found."""

    faults: list[WhetError] = field(default_factory=list)
    way: list[Path] = field(default_factory=list)

    def policy(self, name_or_path: str, base: Path, where: str) -> Policy | None:
        """where: the key that asks for it. None when it can't be read at all; smaller faults are left in `faults`."""
        if "\0" in name_or_path:
            self._fault("a null character is in the policy's name", where, "take it out")
            return None
        named = FOLDER / f"{name_or_path}.yaml" if name_or_path in BUILT_IN else base / Path(name_or_path).expanduser()
        path = Path(os.path.realpath(named))
        if path in self.way:
            names = " -> ".join(step.name for step in [*self.way[self.way.index(path) :], path])
            self._fault(f"the policies extend each other in a circle: {names}", where, "take one `extends` out")
            return None
        self.way.append(path)
        document = self._document(path, name_or_path, where)
        return self._checked(document) if document else None

    def _document(self, path: Path, name: str, where: str) -> _Document | None:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._fault(f"there is no policy {name!r} and no such file", where, nearest(name, BUILT_IN))
        except IsADirectoryError:
            self._fault(f"{name!r} is a folder", where, "name the policy's file in it")
        except (OSError, ValueError):  # permissions, a broken link, not UTF-8
            self._fault(f"{name!r} can't be read as UTF-8 text", where, "check the file and its permissions")
        else:
            try:
                return _Document.of(text, path)
            except WhetError as error:
                self.faults += error.errors if isinstance(error, WhetErrors) else [error]
        return None

    def _checked(self, document: _Document) -> Policy:
        """The policy as far as it is sound, on top of what it extends."""
        values = document.values
        for key in values:
            if key not in Policy.model_fields:
                self._fault("unknown key", document.where(key), nearest(str(key), Policy.model_fields))
        texts = {key: self._text(document, key) for key in ("name", "description", "extends")}
        if texts["name"] is None:
            self._fault("a policy has a name", document.where("name"), f"name: {document.path.stem}")
        classes, regions = self._classes(document), self._regions(document)
        if extends := texts["extends"]:
            extended = self.policy(extends, document.path.parent, document.where("extends"))
            if extended:
                classes, regions = {**extended.classes, **classes}, regions or extended.regions
        return Policy(
            name=texts["name"] or document.path.stem,
            description=texts["description"] or "",
            extends=extends,
            classes=classes,
            regions=regions or REGIONS,
        )

    def _text(self, document: _Document, key: str) -> str | None:
        value = document.values.get(key)
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        self._fault(f"{value!r} is no text", document.where(key), f'{key}: "a text in quotes"')
        return None

    def _classes(self, document: _Document) -> dict[str, Mode]:
        given = document.values.get("classes")
        if given is None:
            return {}
        if not isinstance(given, dict):
            self._fault("this is a mapping of classes to modes", document.where("classes"), "EMAIL: placeholder")
            return {}
        return _sound(given, lambda entity: document.where("classes", entity), self.faults)

    def _regions(self, document: _Document) -> tuple[str, ...] | None:
        """None where the file names none, or is at fault."""
        given, where = document.values.get("regions"), document.where("regions")
        if given is None:
            return None
        if not isinstance(given, list) or not given:
            self._fault("this is a list of countries", where, "regions: [US, DE]")
            return None
        faults = check_regions(given, where)
        self.faults += faults
        return None if faults else tuple(given)

    def _fault(self, what: str, where: str, fix: str) -> None:
        self.faults.append(WhetError(what, where=where, fix=fix))


def _sound(given: Mapping[Any, Any], where: Callable[[Any], str], faults: list[WhetError]) -> dict[str, Mode]:
    """The classes and modes that there are; the others become faults. where: of a class."""
    sound: dict[str, Mode] = {}
    for entity, mode in given.items():
        if entity not in ENTITIES:
            fix = nearest(str(entity).upper(), ENTITIES)
            faults.append(WhetError(f"there is no class {entity!r}", where=where(entity), fix=fix))
        if mode not in MODES:
            faults.append(WhetError(f"{mode!r} is no mode", where=where(entity), fix=nearest(str(mode), MODES)))
        elif entity in ENTITIES:
            sound[entity] = mode
    return sound


@dataclass(frozen=True)
class _Document:
    """A YAML mapping and the lines of its keys, the keys under `classes` too."""

    path: Path
    values: dict[Any, Any]
    lines: Mapping[tuple[Any, ...], int]

    @staticmethod
    def of(text: str, path: Path) -> _Document:
        """Raises WhetError for what is no YAML mapping, and for a key that stands twice (YAML drops one in silence)."""
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            raise WhetError("not valid YAML", where=where, fix="check the indentation and quotes here") from None
        if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
            fix = "start with `name:` and `classes:`"
            raise WhetError("a policy is a mapping of keys", where=str(path), fix=fix)
        lines: dict[tuple[Any, ...], int] = {}
        repeated = list(_walk(node, (), lines, path))
        if repeated:
            raise WhetErrors(repeated)
        return _Document(path, values, lines)

    def where(self, *keys: Any) -> str:
        """`file:line: key.key`, by the nearest key that is written in the file."""
        line = next((self.lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in self.lines), 1)
        return f"{self.path}:{line}: {'.'.join(map(str, keys))}"


def _walk(
    node: yaml.MappingNode, above: tuple[Any, ...], lines: dict[tuple[Any, ...], int], path: Path
) -> Iterable[WhetError]:
    """Record the lines of a mapping's keys and of those of a mapping in it; yields the keys that stand twice."""
    for key, value in node.value:
        here, line = (*above, key.value), key.start_mark.line + 1
        if here in lines:
            yield WhetError(f"the key {key.value!r} stands here twice", where=f"{path}:{line}", fix="keep one")
        lines[here] = line
        if isinstance(value, yaml.MappingNode) and not above:
            yield from _walk(value, here, lines, path)


def nearest(given: str, choices: Iterable[str]) -> str:
    """What to type instead of a name that there is not."""
    choices = list(choices)
    near = difflib.get_close_matches(given, choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(choices)}"
