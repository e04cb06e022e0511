"""A scorer that asks whether an answer is JSON of a given schema, and the value that the reference is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from whet.errors import WhetError
from whet.evals.scorers.base import Each, Kind, Options, Question, Score

EXTRA = 'pip install "whet[eval]"'
COLUMN = "schema"


class JsonSchemaOptions(Options):
    inline: dict[str, Any] | None = Field(None, alias="schema", description="A JSON Schema.")
    file: str | None = Field(None, description="A file that holds one, relative to the task.")
    find: Literal["whole", "block"] = Field(
        "whole", description="The answer is JSON and nothing else, or holds it between ``` lines."
    )
    equals_reference: bool = Field(False, description="The value must also be that of the reference, which is JSON.")

    @model_validator(mode="after")
    def _one_schema(self) -> JsonSchemaOptions:
        if self.inline is not None and self.file is not None:
            raise ValueError("schema and file both say what is asked for; keep one")
        return self


@dataclass(frozen=True)
class JsonSchema(Each):
    """1 where the answer fits the schema: the row's own, or the task's."""

    options: JsonSchemaOptions
    schema: Any

    def check(self, question: Question) -> None:
        self.validator(question)
        if self.options.equals_reference:
            if not question.references:
                raise WhetError("there is no reference to compare with", fix="add one, or leave equals_reference out")
            for reference in question.references:
                if isinstance(found := read(reference), Unreadable):
                    raise WhetError(f"the reference is not JSON: {found.why}", fix="write it as JSON text")

    def one(self, question: Question, answer: str) -> Score:
        text = answer if self.options.find == "whole" else block(answer)
        if text is None:
            return Score(0.0, "no ``` block in the answer")
        value = read(text)
        if isinstance(value, Unreadable):
            return Score(0.0, f"not JSON: {value.why}")
        try:
            fault = next(iter(self.validator(question).iter_errors(value)), None)
        except RecursionError:
            return Score(0.0, "nested too deep")
        except _unresolvable() as error:
            return Score(None, f"the schema refers to what it does not hold: {error}")
        if fault is not None:
            return Score(0.0, f"{fault.json_path}: {fault.message}"[:500])
        if self.options.equals_reference and not any(same(value, read(r)) for r in question.references):
            return Score(0.0, "fits the schema, but is not the reference")
        return Score(1.0)

    def validator(self, question: Question) -> Any:
        schema = question.extra.get(COLUMN, self.schema)
        if isinstance(schema, str):
            schema = read(schema)
        if schema is None or isinstance(schema, Unreadable):
            raise WhetError("there is no schema", fix="give the scorer a schema or a file, or each row a schema")
        return _validator(schema)


@dataclass(frozen=True)
class Unreadable:
    """Text that is not JSON."""

    why: str


def read(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity are none."""
    try:
        return json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        return Unreadable(str(error))


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; true is not 1, and 1.0 is 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def block(answer: str) -> str | None:
    """What the first pair of ``` lines holds."""
    found = re.search(r"^```[^\n`]*\n(.*?)^```", answer, flags=re.DOTALL | re.MULTILINE)
    return found[1] if found else None


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _unresolvable() -> type[Exception]:
    """What jsonschema raises for a $ref that leads out of the schema."""
    from referencing.exceptions import Unresolvable

    return Unresolvable


def _validator(schema: Any) -> Any:
    try:
        from jsonschema import Draft202012Validator, SchemaError  # type: ignore[import-untyped]
        from jsonschema.validators import validator_for  # type: ignore[import-untyped]
        from referencing import Registry
    except ImportError as error:
        raise WhetError("schemas are checked by jsonschema, which is not here", where="scorer", fix=EXTRA) from error
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise WhetError(f"not a JSON Schema: {error.message}", where=COLUMN, fix="mend the schema") from None
    # a registry of its own: jsonschema would otherwise fetch a $ref from the network
    return kind(schema, registry=Registry())


def _build(options: JsonSchemaOptions, folder: Path) -> JsonSchema:
    schema = options.inline
    if options.file is not None:
        path = folder / options.file
        try:
            schema = read(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise WhetError(f"the schema can't be read: {error}", where=str(path), fix="check the path") from error
        if isinstance(schema, Unreadable):
            raise WhetError(f"not JSON: {schema.why}", where=str(path), fix="mend the schema")
    if schema is not None:
        _validator(schema)
    return JsonSchema(options, schema)


JSON_SCHEMA = Kind(JsonSchemaOptions, _build, needs_reference=False, columns=(COLUMN,), reads=("file",))
