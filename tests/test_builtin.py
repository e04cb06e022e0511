"""`builtin:tiny`: small enough to ship, whole, and trained on what it should be."""

from __future__ import annotations

import json
import math
from itertools import islice
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quickstart.entries import entries, held_out
from whet import FastLanguageModel
from whet.data.fingerprint import PARTS, fingerprint
from whet.data.template import render
from whet.evals.heldout import generate, mean_loss
from whet.models.load import BUILTIN

FOLDER = BUILTIN / "tiny"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return FastLanguageModel.from_pretrained("builtin:tiny", load_in_4bit=False, dtype="float32")


def test_its_files() -> None:
    """Catches a package that has grown, a pickle, and weights in another type."""
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 15 * 2**20
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert {path.suffix for path in FOLDER.iterdir()} <= {".json", ".jinja", ".safetensors"}
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == 8192


def test_its_size(tiny: Any) -> None:
    model, tokenizer = tiny
    assert 6e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    assert len(tokenizer) <= 8192
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_it_has_learned_the_language_of_the_documentation(tiny: Any) -> None:
    """On documentation strings that were kept from its training: a random model has ln(8192) = 9.01 nats a token."""
    model, tokenizer = tiny
    docs = list(islice((entry.doc for entry in entries() if len(entry.doc) > 80 and held_out(entry.doc)), 12))
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(docs)["input_ids"]]
    assert mean_loss(model, rows) < 4 < math.log(8192)


def test_its_chat_template_and_stop(tiny: Any) -> None:
    """Catches a turn that the model can't end, and special tokens that are split."""
    model, tokenizer = tiny
    messages = [{"role": "user", "content": "What does json.loads do?"}, {"role": "assistant", "content": "It parses."}]
    text = render(tokenizer, messages)
    assert text.rstrip().endswith(tokenizer.eos_token)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) >= 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    prompt = render(tokenizer, messages[:1], add_generation_prompt=True)
    assert text.startswith(prompt)
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=80)
    assert answer
    assert fingerprint(tokenizer).keys() == PARTS.keys()


def test_it_stops_by_itself(tiny: Any) -> None:
    """Catches a model that never learned to end its turn."""
    model, tokenizer = tiny
    messages = [{"role": "user", "content": "What does json.loads do?"}]
    prompt = render(tokenizer, messages, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
    assert out[0, -1] == tokenizer.eos_token_id
