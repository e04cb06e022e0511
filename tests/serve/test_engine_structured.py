"""Answers that obey a JSON Schema, from a model that knows nothing of JSON."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.serve.engines import ask, pieces, save, with_engine
from whet.serve.engines.in_process.engine import InProcessEngine
from whet.serve.engines.mailbox import merged
from whet.serve.interface import Piece, Refused

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False},
    {"enum": ["red", "green", "bleu à l'œil"]},
    {"type": "array", "items": {"type": "integer", "minimum": 3, "maximum": 12}, "minItems": 2, "maxItems": 3},
    {
        "$defs": {"leaf": {"type": "string", "maxLength": 3}},
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/leaf"}, "y": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}},
        "required": ["x", "y"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), tiny_llama, initializer_range=0.02)


def test_answers_obey_their_schema(model: Path) -> None:
    """Catches a mask of another row or position, and an answer that does not end with the JSON."""

    async def use(engine: InProcessEngine) -> list[Piece]:
        asked = [
            ask([5, 6], max_tokens=200, temperature=temperature, seed=seed, schema=schema)
            for schema in SCHEMAS
            for seed, temperature in enumerate((0.0, 1.0, 1.5))
        ]
        return [merged(answer) for answer in await asyncio.gather(*(pieces(engine, request) for request in asked))]

    answers = with_engine(model, use)
    for i, answer in enumerate(answers):
        assert answer.finish == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMAS[i // 3])


def test_an_empty_schema_is_any_object(model: Path) -> None:
    """Catches JSON that is no object, where OpenAI's json_object promises one."""

    async def use(engine: InProcessEngine) -> list[str]:
        asked = [ask([5], max_tokens=10, temperature=1.0, seed=seed, schema={}) for seed in range(4)]
        return [merged(await pieces(engine, request)).text for request in asked]

    assert all(answer.lstrip()[0] == "{" for answer in with_engine(model, use))


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"$ref": "#/missing"}, {"type": "string", "pattern": "("}], ids=str
)
def test_a_schema_that_can_not_be_enforced_is_refused(model: Path, schema: dict[str, Any]) -> None:
    """Catches a schema that is dropped, and one that fails in the engine's thread."""
    with pytest.raises(Refused) as refused:
        with_engine(model, lambda engine: pieces(engine, ask([5], schema=schema)))
    assert refused.value.param == "response_format"
