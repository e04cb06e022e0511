"""The recipe: what loads, what is refused, its digest and its schema."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console

from quickstart import make_data
from tests.road import RECIPE, write_recipe, write_rows
from whet import pipeline
from whet.errors import WhetError, WhetErrors
from whet.models.fused import shared_of
from whet.recipe import Recipe, load
from whet.recipe_docs import json_schema
from whet.recipe_model import load_base, load_for_training
from whet.yaml_faults import section_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def faults(path: Path) -> list[WhetError]:
    with pytest.raises(WhetErrors) as caught:
        load(path)
    return caught.value.errors


def sections(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if (section := section_of(field.annotation)) is not None:
            yield from sections(section)


# ---------------------------------------------------------------- any text at all

KEYS = sorted({name for section in sections() for name in section.model_fields})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["builtin:tiny", "nf4", "rows.jsonl", "*.jsonl", "all-linear", "sft", "dpo", "q8_0", "~", "~x"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=4), st.integers()), inner, max_size=5),
    ),
    max_leaves=12,
)


@st.composite
def recipe_like(draw: st.DrawFn) -> dict[Any, Any]:
    """A sound recipe in which some values are others, and some keys are gone or new."""
    recipe = json.loads(json.dumps(RECIPE))
    for _ in range(draw(st.integers(0, 4))):
        section = recipe
        while True:
            key = draw(st.one_of(st.sampled_from(sorted(section, key=str) or ["name"]), st.sampled_from(KEYS)))
            inner = section.get(key)
            if not isinstance(inner, dict) or draw(st.booleans()):
                break
            section = inner
        if draw(st.booleans()):
            section[key] = draw(VALUES)
        else:
            section.pop(key, None)
    return recipe


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl")
        yield Path(folder)


def load_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        recipe = load(path)
    except WhetError as error:
        for fault in error.errors if isinstance(error, WhetErrors) else [error]:
            assert fault.where
            assert fault.where.startswith(str(path))
            assert fault.fix
    else:
        json.dumps(recipe.model_dump(), allow_nan=False)  # a digest that other readers of JSON can check


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=st.one_of(recipe_like(), VALUES))
def test_any_yaml_loads_or_is_refused(place: Path, recipe: Any) -> None:
    """Catches every exception but WhetError, and every fault without a place or a fix."""
    load_or_refuse(place / "recipe.yaml", yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "replace"))


@settings(max_examples=150, deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text(alphabet="ab:-[]{}&*!|>#'\"?,\n \t%@`0~<=", max_size=60)))
def test_any_bytes_load_or_are_refused(place: Path, content: bytes | str) -> None:
    """Catches what YAML itself trips over: anchors, tags, dates, keys that are lists."""
    load_or_refuse(place / "recipe.yaml", content if isinstance(content, bytes) else content.encode())


# ---------------------------------------------------------------- faults


def test_every_fault_has_its_line_and_fix(folder: Path) -> None:
    """Catches a list of faults that stops at the first section."""
    changes = {"model.lod": "nf4", "adapter.r": 0, "train.epochs": "two", "data.sources": [{"paths": "rows.jsonl"}]}
    path = write_recipe(folder, changes)
    found = {fault.where.rpartition(": ")[2]: fault for fault in faults(path)}
    assert set(found) == {"model.lod", "adapter.r", "train.epochs", "data.sources.0.paths"}
    lines = path.read_text().splitlines()
    for name in ("model.lod", "adapter.r", "train.epochs", "data.sources.0.paths"):
        line = int(found[name].where.split(":")[1])
        assert name.rpartition(".")[2] in lines[line - 1]
    assert found["model.lod"].fix == "did you mean 'load'?"
    assert found["data.sources.0.paths"].fix == "did you mean 'path'?"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["train.epochs", "train.learning_rate", "adapter.alpha", "train.max_grad_norm"])
def test_no_number_may_be_infinite(folder: Path, key: str, value: float) -> None:
    """Catches a run of endless epochs."""
    (fault,) = faults(write_recipe(folder, {key: value}))
    assert key in str(fault.where)


def test_a_seed_is_one_that_numpy_takes(folder: Path) -> None:
    assert load(write_recipe(folder, {"seed": 2**32 - 1})).seed == 2**32 - 1
    assert "seed" in str(faults(write_recipe(folder, {"seed": 2**32}))[0].where)


def test_sources_are_files(folder: Path) -> None:
    """Catches a folder that is taken for data, and a glob that takes one up among its files."""
    (folder / "more.jsonl").mkdir()
    assert [p.name for p in load(write_recipe(folder)).data.sources[0].files(folder)] == ["rows.jsonl"]
    both = load(write_recipe(folder, {"data.sources": [{"path": "*.jsonl"}]}))
    assert [p.name for p in both.data.sources[0].files(folder)] == ["rows.jsonl"]
    assert "no file matches" in faults(write_recipe(folder, {"data.sources": [{"path": "more.jsonl"}]}))[0].what


# ---------------------------------------------------------------- FP8

FP8 = {"model.load": "nf4", "model.compute": "fp8", "adapter.dropout": 0.0}


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"model.compute": "fp4"}, "did you mean 'fp8'?"),
        ({"model.load": "int8"}, "use load: nf4"),
        ({"model.load": "16bit"}, "use load: nf4"),
        ({"model.load": "16bit", "adapter": None}, "use compute: bf16"),
        ({"model.dtype": "float16"}, "use dtype: bfloat16"),
        ({"adapter.dropout": 0.1}, "leave dropout out"),
        ({"adapter.dora": True}, "leave dora out"),
    ],
)
def test_a_recipe_that_can_not_have_fp8(folder: Path, changes: dict[str, Any], fix: str) -> None:
    """Catches FP8 that is found impossible only when the model is loaded, or never."""
    assert load(write_recipe(folder, FP8)).model.compute == "fp8"
    path = write_recipe(folder, FP8 | changes)
    (fault,) = faults(path)
    assert fix in str(fault.fix)
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "compute:" in text)
    assert fault.where == f"{path}:{line}: model.compute" or fault.where == f"{path}:{line}: recipe"


def test_a_run_in_fp8_without_a_gpu_ends_before_it_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches data that is prepared first, and a training in 16 bits that the recipe did not ask for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = load(write_recipe(folder, FP8))
    with pytest.raises(WhetError, match="there is no GPU here"):
        pipeline.run_recipe(recipe, folder, folder / "runs", Console(quiet=True))
    assert not list((folder / "runs").glob("*/data"))
    with pytest.raises(WhetError, match="there is no GPU here"):
        load_for_training(recipe)


def test_evaluation_and_export_compute_in_16_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trained model that can't be exported on a machine without FP8, or is scored unlike what is exported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model, _ = load_base(load(write_recipe(folder, FP8)).model)
    shared = shared_of(model)
    assert shared is not None
    assert not shared.fp8


# ---------------------------------------------------------------- digest


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return value


def test_the_digest_does_not_rest_on_the_order_of_keys(folder: Path) -> None:
    one = Recipe.model_validate(RECIPE)
    assert Recipe.model_validate(shuffled(RECIPE)).digest() == one.digest()


def test_the_digest_rests_on_every_value() -> None:
    """Catches a field that the digest leaves out: its change would go on in the folder of the old run."""
    one = Recipe.model_validate(RECIPE)
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"model": {**RECIPE["model"], "load": "16bit"}},
        {"adapter": {**RECIPE["adapter"], "r": 5}},
        {"train": {**RECIPE["train"], "weight_decay": 0.1}},
        {"export": {"gguf": ["q8_0"]}},
    ]
    digests = {Recipe.model_validate({**RECIPE, **change}).digest() for change in changes}
    assert len(digests | {one.digest()}) == len(changes) + 1


def test_what_is_said_and_what_is_left_to_its_default_are_one(folder: Path) -> None:
    said = Recipe.model_validate({**RECIPE, "seed": 3407, "export": {"gguf": [], "merged": None}})
    assert said.digest() == Recipe.model_validate(RECIPE).digest()


def test_the_resolved_recipe_loads_as_the_same_recipe(folder: Path) -> None:
    """Catches a run's recipe.yaml that can't be run again."""
    recipe = load(write_recipe(folder))
    (folder / "resolved.yaml").write_text(yaml.safe_dump(recipe.model_dump(), sort_keys=False))
    assert load(folder / "resolved.yaml").digest() == recipe.digest()


# ---------------------------------------------------------------- schema and the recipes that are shipped


def test_every_key_is_described() -> None:
    """Catches a field without a description, which is its only documentation."""
    for section in sections():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_the_schema_is_closed_and_complete() -> None:
    """Catches an editor that accepts a key which `whet run` refuses, or the reverse."""
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    parts = {"Recipe": schema, **schema["$defs"]}
    for section in sections():
        part = parts[section.__name__]
        assert part["additionalProperties"] is False
        assert set(part["properties"]) == set(section.model_fields)
        required = {name for name, field in section.model_fields.items() if field.is_required()}
        assert set(part.get("required", [])) == required


def test_the_schema_in_the_docs_is_today_s() -> None:
    """Mend it with: whet schema > docs/recipe.schema.json"""
    written = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema()


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of recipes/ beside the data that the quickstart makes."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipes").mkdir()
    make_data.main(folder / "build" / "quickstart")
    for path in (ROOT / "recipes").glob("*.yaml"):
        (folder / "recipes" / path.name).write_bytes(path.read_bytes())
    return folder / "recipes"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "recipes").glob("*.yaml")))
def test_the_recipes_load(recipes: Path, name: str) -> None:
    recipe = load(recipes / name)
    keys_follow(yaml.safe_load((recipes / name).read_text()), json_schema(), json_schema()["$defs"])
    assert recipe.name == Path(name).stem


def keys_follow(value: Any, schema: dict[str, Any], parts: dict[str, Any]) -> None:
    """Every key of `value` stands in the schema at its place."""
    options = [schema, *schema.get("anyOf", [])]
    options = [parts[option["$ref"].rpartition("/")[2]] if "$ref" in option else option for option in options]
    if isinstance(value, dict):
        known = {name: part for option in options for name, part in option.get("properties", {}).items()}
        for key, inner in value.items():
            assert key in known, key
            keys_follow(inner, known[key], parts)
    elif isinstance(value, list):
        items = next(option["items"] for option in options if "items" in option)
        for inner in value:
            keys_follow(inner, items, parts)
