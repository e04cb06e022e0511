"""A tokenizer that does not fit its model is found before an export, by the files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import whet
from tests.export.tiny_llama import byte_level_tokenizer, save_llama
from whet.data.fingerprint import fingerprint, keep
from whet.errors import WhetError, WhetErrors
from whet.export.vocabulary import check_vocabulary


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    tokenizer = byte_level_tokenizer()
    return save_llama(tmp_path_factory.mktemp("saved"), tokenizer, num_hidden_layers=1, hidden_size=64)


@pytest.fixture
def model_dir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _add_tokens(folder: Path, out: Path, *tokens: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(out)
    return out


def test_what_fits(model_dir):
    """Also with rows to spare, as embeddings padded to a multiple have."""
    found = check_vocabulary(model_dir, base_dir=model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert (found.tokens, found.rows, found.head_rows) == (len(tokenizer), len(tokenizer) + 2, len(tokenizer) + 2)
    assert found.added["<tool>"] == tokenizer.convert_tokens_to_ids("<tool>")
    assert found.fingerprint == fingerprint(tokenizer)


def test_the_built_in_model_fits():
    """Catches a check that a sound model does not pass."""
    found = check_vocabulary(Path(whet.__file__).parent / "builtin" / "tiny")
    assert found.tokens == found.rows


def test_added_tokens_without_rows(model_dir, tmp_path):
    """Catches tokens added after training, or an embedding that was not resized."""
    tokenizer_dir = _add_tokens(model_dir, tmp_path / "more", "<one>", "<two>", "<three>")
    with pytest.raises(WhetErrors, match="1 tokens have none, among them the added token '<three>'"):
        check_vocabulary(model_dir, tokenizer_dir=tokenizer_dir)


def test_rows_that_come_with_the_adapter_count(model_dir, tmp_path):
    """Catches an adapter refused though it was trained with the resized embedding it carries."""
    tokenizer_dir = _add_tokens(model_dir, tmp_path / "more", "<one>", "<two>", "<three>")
    rows = len(AutoTokenizer.from_pretrained(tokenizer_dir))
    adapter_dir = tmp_path / "adapter"
    adapter_dir.mkdir()
    names = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    save_file({name: torch.zeros(rows, 64) for name in names}, adapter_dir / "adapter_model.safetensors")
    found = check_vocabulary(model_dir, tokenizer_dir=tokenizer_dir, adapter_dir=adapter_dir)
    assert (found.rows, found.head_rows) == (rows, rows)


def test_a_tokenizer_whose_tokens_moved(model_dir, tmp_path):
    """Catches a tokenizer trained anew, or one with tokens inserted, beside weights of the old one."""
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WhetErrors, match="2 tokens have another id than in the base model, '!' first"):
        check_vocabulary(model_dir, tokenizer_dir=other, base_dir=model_dir)


def test_a_token_that_is_gone(model_dir, tmp_path):
    more = _add_tokens(model_dir, tmp_path / "more", "<one>")
    with pytest.raises(WhetErrors, match="1 tokens of the base model are missing, '<one>' first"):
        check_vocabulary(model_dir, base_dir=more)


def test_another_fingerprint(model_dir, tmp_path):
    """Catches a template changed between training and export."""
    kept = tmp_path / "run"
    kept.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    keep(fingerprint(tokenizer), kept)
    assert check_vocabulary(model_dir, fingerprint_dir=kept).fingerprint == fingerprint(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(WhetErrors, match="chat template is not what the model was tuned with"):
        check_vocabulary(model_dir, fingerprint_dir=kept)
    with pytest.raises(WhetErrors, match=r"fingerprint\.json: the file is missing"):
        check_vocabulary(model_dir, fingerprint_dir=model_dir)


FILE_FAULTS = {
    "an end that the model does not know": (
        "generation_config.json",
        {"eos_token_id": [0]},
        r"answers end with the token ids \[0\]",
    ),
    "an id that no token has": ("config.json", {"bos_token_id": 5000}, "bos_token_id is 5000"),
    "another size": ("config.json", {"vocab_size": 64}, "vocab_size is 64 but the embedding has"),
}


@pytest.mark.parametrize(("name", "changes", "match"), FILE_FAULTS.values(), ids=FILE_FAULTS)
def test_a_file_at_fault(name, changes, match, model_dir):
    _change(model_dir / name, **changes)
    with pytest.raises(WhetErrors, match=match):
        check_vocabulary(model_dir)


def test_all_faults_are_told_at_once(model_dir):
    _change(model_dir / "config.json", vocab_size=64, pad_token_id=5000)
    with pytest.raises(WhetErrors) as caught:
        check_vocabulary(model_dir)
    assert len(caught.value.errors) == 2


def test_a_head_of_another_size(model_dir):
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-2].contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(WhetErrors, match="the head has 602 rows but the embedding 604"):
        check_vocabulary(model_dir)


def test_no_weights_and_cut_weights(model_dir):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(WhetError, match="longer than the file"):
        check_vocabulary(model_dir)
    path.unlink()
    with pytest.raises(WhetError, match="no embedding here"):
        check_vocabulary(model_dir)
