"""The recipe's reference, for editors (JSON Schema) and for people (Markdown), made from the models themselves."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from whet.recipe import Recipe
from whet.yaml_faults import section_of


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe: completion, help and checking while typing."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "whet recipe",
        **Recipe.model_json_schema(),
    }


def markdown() -> str:
    """A table of every key, its default, and what it means."""
    lines = ["| key | default | meaning |", "|---|---|---|", *_rows(Recipe, "")]
    return "\n".join(lines)


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        listed = "[]" if inner is not None and "list" in str(field.annotation) else ""
        rows.append(f"| `{prefix}{name}{listed}` | {_default(field)} | {field.description} |")
        if inner is not None and (prefix, name) != ("data.", "eval_sources"):
            rows += _rows(inner, f"{prefix}{name}{listed}.")
    return rows


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        made = field.get_default(call_default_factory=True, validated_data={})
        return "" if isinstance(made, BaseModel) else f"`{json.dumps(made)}`"
    return f"`{json.dumps(field.default)}`"
