"""Embeddings are those of sentence-transformers, from the folders that it writes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.serve.engines import ask
from whet.errors import WhetError
from whet.serve.engines.in_process import open_engine
from whet.serve.interface import Embedded, Refused, UnknownModel

TEXTS = ["a b c", "The quick brown fox jumps over the lazy dog. " * 3, "x", "日本"]


@pytest.fixture(scope="module")
def encoder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None  # sentence-transformers would put texts into it
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=512, max_position_embeddings=128, initializer_range=0.2, **sizes)).save_pretrained(
        folder
    )
    return folder


def with_head(encoder: Path, folder: Path, pooling: str, normalize: bool) -> Path:
    """The encoder as sentence-transformers saves it with that head."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(encoder))
    modules = [transformer, Pooling(32, pooling_mode=pooling), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


def embed(folder: Path, texts: Any, model: str = "encoder") -> Embedded:
    async def run() -> Embedded:
        engine = open_engine(folder, name="encoder")
        await engine.start()
        try:
            assert [served.kind for served in engine.models()] == ["embedding"]
            return await engine.embed(model, texts)
        finally:
            await engine.stop()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("pooling", "normalize"), [("mean", True), ("cls", False), ("max", False), ("lasttoken", True)]
)
def test_vectors_are_those_of_sentence_transformers(
    encoder: Path, tmp_path: Path, pooling: str, normalize: bool
) -> None:
    """Catches padding that takes part in a mean, vectors in the order of length, and a head that is left out."""
    from sentence_transformers import SentenceTransformer

    folder = with_head(encoder, tmp_path / "model", pooling, normalize)
    expected = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(TEXTS)
    found = embed(folder, TEXTS)
    np.testing.assert_allclose(np.array(found.vectors), expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found.tokens == sum(map(len, rows))
    np.testing.assert_allclose(np.array(embed(folder, rows).vectors), expected, atol=1e-5)


def test_what_can_not_be_embedded_is_refused(encoder: Path, tmp_path: Path) -> None:
    folder = with_head(encoder, tmp_path / "model", "mean", True)
    for texts in ([""], [[]], [[512]], [["a"]], ["x y " * 300]):
        with pytest.raises(Refused):
            embed(folder, texts)
    with pytest.raises(UnknownModel):
        embed(folder, ["a"], "other")

    async def generate() -> None:
        async for _ in open_engine(folder, name="encoder").generate(ask("x", "encoder")):
            pass

    with pytest.raises(Refused):
        asyncio.run(generate())


def test_modules_that_are_not_known_are_refused(encoder: Path, tmp_path: Path) -> None:
    """Catches a dense layer that is left out of every vector."""
    folder = with_head(encoder, tmp_path / "model", "mean", True)
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    modules.insert(2, {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    path.write_text(json.dumps(modules))
    with pytest.raises(WhetError, match="Dense"):
        embed(folder, ["a"])
