"""What write_gguf refuses: each with a message that names the place, and no file left behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.tiny_llama import byte_level_tokenizer, save_llama
from whet.errors import WhetError
from whet.export.gguf import write_gguf


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("saved"), byte_level_tokenizer(), num_hidden_layers=1)


@pytest.fixture
def model_dir(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _refused(model_dir: Path, match: str, quantization: str = "f16") -> None:
    out = model_dir.parent / "out" / "m.gguf"
    with pytest.raises(WhetError, match=match):
        write_gguf(model_dir, out, quantization)
    assert not out.parent.exists() or not list(out.parent.iterdir())


CONFIG_FAULTS = {
    "another architecture": ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel(.|\n)*LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "leaves out"),
    "a quantized checkpoint": ({"quantization_config": {"load_in_4bit": True}}, "quantized"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "dynamic rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    "partial rope": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
    "a wrong size": ({"intermediate_size": 480}, r"has shape \[512, 256\], but config.json implies \[480, 256\]"),
    "too many layers": ({"num_hidden_layers": 2}, r"lacks 9 tensors: model\.layers\.1"),
    "too few rows for the vocabulary": ({"vocab_size": 600}, "602 tokens but the model's embedding has 600 rows"),
}


@pytest.mark.parametrize(("changes", "match"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_config_at_fault(changes, match, model_dir):
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    _refused(model_dir, match)


def test_mistral_without_a_window_is_a_llama(model_dir, tmp_path):
    path = model_dir / "config.json"
    changes = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert write_gguf(model_dir, tmp_path / "m.gguf", "f16").path.is_file()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(name, model_dir):
    (model_dir / name).unlink()
    _refused(model_dir, name.replace(".", r"\."))


def test_pickle_checkpoint(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    _refused(model_dir, "pickle checkpoints")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_broken_file(name, model_dir):
    (model_dir / name).write_bytes(b"{broken")
    _refused(model_dir, "not valid JSON|no safetensors file|cannot be loaded")


def _change_weights(model_dir: Path, change) -> None:
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_left_over_tensor(model_dir):
    """An adapter saved beside the base must not vanish in silence."""
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    _change_weights(model_dir, lambda weights: weights.update({name: torch.zeros(8, 256)}))
    _refused(model_dir, "no place for, 1 tensors: .*lora_A")


def test_integers_for_weights(model_dir):
    _change_weights(model_dir, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.uint8)}))
    _refused(model_dir, "lm_head.weight holds U8")


@pytest.mark.parametrize(("value", "quantization"), [(float("nan"), "q4_k_m"), (1e5, "f16"), (float("inf"), "f32")])
def test_weight_that_does_not_fit(value, quantization, model_dir):
    def change(weights):
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    _change_weights(model_dir, change)
    _refused(model_dir, r"model\.layers\.0\.mlp\.up_proj\.weight: a weight of magnitude", quantization)


def test_unknown_quantization(model_dir):
    _refused(model_dir, "no GGUF quantization 'q3_k_xxl'", "q3_k_xxl")


def test_disk_too_small(model_dir, monkeypatch):
    """Refused before a byte is written, with the bytes needed."""
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    _refused(model_dir, r"no space left: [\d,]+ bytes needed, 1,000 free")


def test_disk_that_fills_while_writing(model_dir, tmp_path):
    """The operating system stops the file at 1 MB, as a full disk would; an older file of that name stays."""
    out = tmp_path / "m.gguf"
    out.write_bytes(b"older")
    code = (
        "import resource, sys; from pathlib import Path; from whet.errors import WhetError\n"
        "from whet.export.gguf import write_gguf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'f32')\n"
        "except WhetError as error: print(error); sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model_dir), str(out)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout
    assert "bytes there" in done.stdout
    assert out.read_bytes() == b"older"
    assert not list(tmp_path.glob("*.partial"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1_000_000
