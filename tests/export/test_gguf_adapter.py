"""LoRA adapters as GGUF, put on their base by the real llama.cpp and compared with PEFT on transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.export.tiny_models import save_tiny
from tests.llama_cpp import llama_cpp  # noqa: F401 - a fixture
from whet.errors import WhetError
from whet.export.gguf import write_gguf
from whet.export.gguf_adapter import write_gguf_adapter
from whet.export.llama_cpp import Reading, read_logits

PROMPTS = [[5, 77, 300, 41, 9, 512, 8], [0, 33, 33, 34, 590]]
# family, fields of LoraConfig
ADAPTERS = {
    "every projection": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True, "target_modules": ["q_proj", "k_proj"]}),
    "ranks and alphas of their own": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"k_proj": 32, "o_proj": 3}},
    ),
    "embedding and output": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "halves instead of pairs": ("qwen2", {}),
    "projections in one": ("phi3", {}),
    "norms with an offset": ("gemma3", {}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of each family, and its F32 GGUF beside it."""
    root = tmp_path_factory.mktemp("bases")
    bases = {family: save_tiny(root / family, family) for family in ("llama", "qwen2", "phi3", "gemma3")}
    for family, folder in bases.items():
        write_gguf(folder, root / f"{family}.gguf", "f32", check=False)
    return bases


def _model(base: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _save_adapter(base: Path, folder: Path, **fields: object) -> PeftModel:
    """A random adapter; both of its halves are far from zero."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **fields}
    model = get_peft_model(_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


@pytest.mark.usefixtures("llama_cpp")
def test_llama_cpp_answers_with_the_adapter_as_peft_does(bases, tmp_path):
    """Catches wrong scales, rows of q and k in the base's old order, a transposed embedding, lost layers."""
    expected, readings = {}, []
    for name, (family, fields) in ADAPTERS.items():
        model = _save_adapter(bases[family], tmp_path / name, **fields)
        with torch.no_grad():
            expected[name] = [model(torch.tensor([ids])).logits[0].numpy() for ids in PROMPTS]
            with model.disable_adapter():
                assert np.abs(model(torch.tensor(PROMPTS[:1])).logits[0].numpy() - expected[name][0]).max() > 0.1
        report = write_gguf_adapter(tmp_path / name, bases[family], tmp_path / f"{name}.gguf")
        base = bases[family].with_name(f"{family}.gguf")
        readings += [Reading(base, ids, adapter=report.path) for ids in PROMPTS]
    found = iter(read_logits(readings, threads=1))
    for name, answers in expected.items():
        for answer in answers:
            assert np.abs(next(found) - answer).max() <= 1e-3, name


def test_scales_of_their_own_are_in_b_alone(bases, tmp_path):
    """One alpha a file: where all layers share one nothing is multiplied, so that weights are PEFT's to the bit."""
    _save_adapter(bases["qwen2"], tmp_path / "one", use_rslora=True)
    report = write_gguf_adapter(tmp_path / "one", bases["qwen2"], tmp_path / "one.gguf")
    assert (report.alpha, report.rescaled) == (16.0, {})
    reader = gguf.GGUFReader(report.path)
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.1.ffn_down"):
            assert np.array_equal(tensor.data, weights[key.format(tensor.name[-1].upper())])
    assert len(reader.tensors) == 2 * len(report.tensors) == 2 * 14
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.type"] == "adapter"
    assert (value["adapter.type"], value["general.architecture"]) == ("lora", "qwen2")
    _save_adapter(bases["qwen2"], tmp_path / "many", alpha_pattern={"up_proj": 24})
    many = write_gguf_adapter(tmp_path / "many", bases["qwen2"], tmp_path / "many.gguf")
    assert many.rescaled == {"blk.0.ffn_up.weight": 3.0, "blk.1.ffn_up.weight": 3.0}


@pytest.mark.parametrize(("dtype", "most"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_smaller_types(dtype, most, bases, tmp_path):
    """Q8_0 halves A again; B, whose rows are shorter than a block, stays F32."""
    _save_adapter(bases["llama"], tmp_path / "a", target_modules=["v_proj"])
    report = write_gguf_adapter(tmp_path / "a", bases["llama"], tmp_path / "a.gguf", dtype=dtype)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    types = set()
    for tensor in gguf.GGUFReader(report.path).tensors:
        layer, side = tensor.name.split(".")[1], tensor.name[-1]
        source = weights[f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_{side.upper()}.weight"].numpy()
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(decoded - source).max() <= most * np.abs(source).max()
        types.add((side, tensor.tensor_type.name.lower()))
    assert types == {("a", dtype), ("b", "f32" if dtype == "q8_0" else dtype)}


# fields of LoraConfig, and what the refusal says
REFUSED = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "biases": ({"bias": "lora_only"}, "trained biases"),
    "a bias in B": ({"lora_bias": True}, "biases of its own"),
    "a module trained whole": ({"modules_to_save": ["lm_head"]}, "modules trained whole"),
    "tokens trained whole": ({"trainable_token_indices": [3, 4]}, "tokens' embeddings trained whole"),
    "an alpha of nothing": ({"lora_alpha": 0}, "lora_alpha = 0"),
    "a start that changed the base": ({"init_lora_weights": "pissa"}, "started as 'pissa'"),
}


def _refused(adapter: Path, base: Path, match: str, **options: str) -> None:
    out = adapter.parent / "out" / "a.gguf"
    with pytest.raises(WhetError, match=match):
        write_gguf_adapter(adapter, base, out, **options)
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(("fields", "match"), REFUSED.values(), ids=REFUSED)
def test_what_gguf_cannot_hold_is_refused(fields, match, bases, tmp_path):
    """Catches parts of an adapter that are left out in silence."""
    _save_adapter(bases["qwen2"], tmp_path / "a", **{"target_modules": ["q_proj"], **fields})
    _refused(tmp_path / "a", bases["qwen2"], match)


def test_the_wrong_base_is_refused(bases, tmp_path):
    _save_adapter(bases["gemma3"], tmp_path / "a", target_modules=["q_proj"])
    _refused(tmp_path / "a", bases["llama"], r"is for a matrix of \[128, 64\], and the base's is \[64, 64\]")
    _save_adapter(bases["phi3"], tmp_path / "fused")
    _refused(
        tmp_path / "fused", bases["llama"], r"changes model\.layers\.\d\.\S+, and the model in GGUF has no such layer"
    )


def test_a_tied_embedding_is_refused(bases, tmp_path):
    """llama.cpp would put it on the output too, where PEFT does not."""
    _save_adapter(bases["gemma3"], tmp_path / "a", target_modules=["embed_tokens"])
    _refused(tmp_path / "a", bases["gemma3"], r"changes model\.embed_tokens")


def test_another_kind_of_adapter_is_refused(bases, tmp_path):
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(_model(bases["qwen2"]), config).save_pretrained(tmp_path / "a")
    _refused(tmp_path / "a", bases["qwen2"], "of type IA3, not LORA")


def test_broken_adapters_are_refused(bases, tmp_path):
    folder = tmp_path / "a"
    _save_adapter(bases["qwen2"], folder, target_modules=["q_proj"])
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format

    def save(**changes: torch.Tensor | None) -> None:
        changed = {**whole, **{key(side): value for side, value in changes.items()}}
        save_file({name: value for name, value in changed.items() if value is not None}, path)

    save(A=None)
    _refused(folder, bases["qwen2"], r"one half of the adapter of model\.layers\.0\.self_attn\.q_proj is missing")
    save(A=torch.full_like(whole[key("A")], float("nan")))
    _refused(folder, bases["qwen2"], "not finite")
    save(A=whole[key("A")][:2])
    _refused(folder, bases["qwen2"], "is for a matrix of")
    path.write_bytes(b"broken")
    _refused(folder, bases["qwen2"], "cannot be read")
    path.unlink()
    _refused(folder, bases["qwen2"], "weights are missing")
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "peft_type": None}))
    _refused(folder, bases["qwen2"], "of type None")
    _refused(folder, bases["qwen2"], "unknown dtype 'q4_k'", dtype="q4_k")
