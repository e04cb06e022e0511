"""A recipe as a table: every setting by its dotted key, those that differ from whet's defaults told apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from whet.recipe import Recipe
from whet.runs.report.record import Json

TEXT_OF_RECORDS = ("eval.samples",)
"""Settings that may hold prompts. They are counted, not shown: text of records appears among the samples alone."""

MISSING = object()
PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")


@dataclass(frozen=True)
class Setting:
    key: str
    value: str
    chosen: bool


@dataclass(frozen=True)
class Difference:
    """A key whose values are not the same in all runs; a value a run, in their order."""

    key: str
    values: tuple[str, ...]


def sections(recipe: Json) -> list[tuple[str, list[Setting]]]:
    """The recipe's sections, each with its settings. What stands outside of a section comes first, as `recipe`.

    Settings that are empty by default, and were left so, are left out.
    """
    grouped: dict[str, list[Setting]] = {}
    for key, value in flat(recipe):
        section, _, rest = key.partition(".")
        setting = Setting(rest or key, written(key, value), chosen=_usual(key) != value)
        if not setting.chosen and value in (None, [], {}):
            continue
        grouped.setdefault(section if rest else "recipe", []).append(setting)
    return sorted(grouped.items(), key=lambda item: item[0] != "recipe")


def differences(values: Sequence[Json]) -> list[Difference]:
    """The keys in which mappings differ, in the order in which they come up."""
    tables = [dict(flat(value)) for value in values]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [Difference(key, tuple(written(key, table.get(key, MISSING)) for table in tables)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold. A list of mappings has its places as keys, another list is a value."""
    nested = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    items = enumerate(value) if nested else value.items() if isinstance(value, Mapping) else ()
    if prefix and not nested and not (isinstance(value, Mapping) and value):
        yield prefix, value
    for key, inner in items:
        yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))


def written(key: str, value: Any) -> str:
    """A value as the recipe's YAML has it, on one line."""
    if value is MISSING:
        return "not there"
    if key.startswith(TEXT_OF_RECORDS):
        return f"{len(value)} prompts" if isinstance(value, list) else "a prompt"
    if isinstance(value, list):
        return masked("[" + ", ".join(map(str, value)) + "]")
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, float) and len(str(value)) > 12:  # 3e-4 that was computed, as 0.00030000000000000003
        return f"{value:.6g}"
    return masked(str(value))


def masked(text: str) -> str:
    """The text without the passwords of addresses in it: postgresql://user:***@host."""
    return PASSWORD.sub(r"\1:***@", text)


def without_text(recipe: Json) -> dict[str, Any]:
    """The recipe, with the number of its prompts in their place."""
    shown = {name: dict(part) if isinstance(part, Mapping) else part for name, part in recipe.items()}
    for key in TEXT_OF_RECORDS:
        section, _, name = key.partition(".")
        part = shown.get(section)
        if isinstance(part, dict) and part.get(name):
            part[name] = written(key, part[name])
    return shown


def _usual(key: str) -> Any:
    """What a setting is when nothing is said; MISSING for one that must be said."""
    section: type[BaseModel] | None = Recipe
    value: Any = MISSING
    for part in key.split("."):
        if part.isdigit():  # a place in a list of sections, whose settings have defaults of their own
            continue
        if section is None or part not in section.model_fields:
            return value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
        field = section.model_fields[part]
        value = MISSING if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        section = _section(field.annotation)
    return value.model_dump() if isinstance(value, BaseModel) else value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or may hold, or holds a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner))), None)
