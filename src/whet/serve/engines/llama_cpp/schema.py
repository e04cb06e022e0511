"""Which JSON Schemas llama.cpp's grammars, as node-llama-cpp makes them, hold an answer to.

That knows a part of JSON Schema and passes over the rest without a word, so what is not in that part is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whet.serve.interface import Refused

FIELD = "response_format"
PLAIN = {"string", "number", "integer", "boolean", "null"}
SAID = {"title", "description", "$schema", "default", "examples", "$defs"}
BY_TYPE: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "number": set(),
    "integer": set(),
    "boolean": set(),
    "null": set(),
}
FORMATS = {"date-time", "time", "date"}
ANY_OBJECT = r"""
root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( member ( "," ws member )* )? "}"
member ::= string ":" ws value ws
array ::= "[" ws ( value ws ( "," ws value ws )* )? "]"
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" ( ["\\/bfnrt] | "u" [0-9a-fA-F]{4} ) )* "\""
number ::= "-"? ( "0" | [1-9] [0-9]{0,15} ) ( "." [0-9]{1,15} )? ( [eE] [-+]? [0-9]{1,3} )?
ws ::= [ \t\n]{0,20}
"""
"""GBNF for what {} asks for."""


def translated(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema as node-llama-cpp reads it. Raises Refused for what it would pass over."""
    if not isinstance(schema, Mapping):
        raise Refused("a part of the schema is no object", FIELD)
    defs = {"$defs": {name: translated(part) for name, part in schema["$defs"].items()}} if "$defs" in schema else {}
    rest = {key: value for key, value in schema.items() if key not in SAID}
    for choice in ("anyOf", "oneOf"):
        if choice in rest:
            _only(rest, {choice})
            return {"oneOf": [translated(part) for part in rest[choice]], **defs}
    if "$ref" in rest:
        _only(rest, {"$ref"})
        if not str(rest["$ref"]).startswith("#/$defs/"):
            raise Refused(f"$ref {rest['$ref']!r} is not in $defs", FIELD)
        return {"$ref": rest["$ref"], **defs}
    if "enum" in rest or "const" in rest:
        _only(rest, {"enum", "const", "type"})
        values = rest.get("enum", [rest.get("const")])
        if any(isinstance(value, list | dict) for value in values):
            raise Refused("enum and const hold plain values alone here", FIELD)
        return {"enum": list(values), **defs}
    return {**_typed(rest), **defs}


def _typed(rest: dict[str, Any]) -> dict[str, Any]:
    kind = rest.get("type")
    if isinstance(kind, list):
        _only(rest, {"type"})
        if not set(kind) <= PLAIN:
            raise Refused("several types have to be plain ones; use anyOf for others", FIELD)
        return {"type": kind}
    if kind not in BY_TYPE:
        raise Refused(f"type {kind!r} can't be enforced", FIELD)
    _only(rest, {"type"} | BY_TYPE[kind])
    if "format" in rest and rest["format"] not in FORMATS:
        raise Refused(f"format {rest['format']!r} can't be enforced", FIELD)
    made = dict(rest)
    if "properties" in rest:
        made["properties"] = {name: translated(part) for name, part in rest["properties"].items()}
    if isinstance(rest.get("additionalProperties"), Mapping):
        made["additionalProperties"] = translated(rest["additionalProperties"])
    if "items" in rest:
        made["items"] = translated(rest["items"])
    if "prefixItems" in rest:
        made["prefixItems"] = [translated(part) for part in rest["prefixItems"]]
    return made


def _only(schema: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(schema.keys() - known)
    if unknown:
        raise Refused(f"llama.cpp's grammars can't enforce {', '.join(unknown)}", FIELD)
