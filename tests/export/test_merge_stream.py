"""Merging folders: what is written computes what PEFT computes with base and adapter, and faults are found first."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.parity import harness
from tests.parity.families import FAMILIES, write_checkpoint
from whet import FastLanguageModel
from whet.errors import WhetError
from whet.export import merge_files
from whet.export.merge import merged_state_dict, save_merged
from whet.export.merge_stream import merge_folders

IDS = torch.tensor([[5, 9, 17, 33, 40, 3, 77, 101, 64, 21, 8]])
Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip of these tiny weights is a few rows, so that every one is read in many."""
    monkeypatch.setattr(merge_files, "STRIP", 640)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    options: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FAMILIES}
    options["tied"] = ("llama", {"tie_word_embeddings": True})
    return {name: write_checkpoint(root / name, family, **more) for name, (family, more) in options.items()}


def adapted(base: Path, rows: int | None = None, **lora: Any) -> PeftModel:
    """PEFT on transformers, all that trains moved away from where it starts. rows: of an embedding that was resized."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | lora
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def loaded(folder: Path, **options: Any) -> Any:
    """The folder in transformers alone, which must find every weight it wants and no other."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"use_rslora": True}),
    ("llama", {"use_dora": True}),
    ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}}),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    ("llama", {"trainable_token_indices": {"embed_tokens": [3, 9], "lm_head": [9, 5]}}),
    ("llama", {"rows": 140, "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {"rows": 140}),
    ("llama", {"rows": 140, "trainable_token_indices": [130]}),
    ("qwen2", {"bias": "all"}),
    ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    ("tied", {}),
    ("tied", {"trainable_token_indices": [3, 9]}),
    ("tied", {"rows": 140}),
    ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
]
UNTYING: list[dict[str, Any]] = [
    {"modules_to_save": ["embed_tokens"]},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
]


@pytest.mark.parametrize(("base", "lora"), ADAPTERS, ids=str)
def test_the_folder_computes_what_base_and_adapter_do(
    bases: dict[str, Path], tmp_path: Path, base: str, lora: dict[str, Any]
) -> None:
    """Catches a wrong scale, a dropped magnitude, bias, trained module or row, and a head that loses its embedding."""
    model = adapted(bases[base], **lora)
    model.save_pretrained(tmp_path / "adapter")
    found = merge_folders(bases[base], tmp_path / "out", adapter=tmp_path / "adapter", to="fp32")
    merged = loaded(tmp_path / "out")
    assert harness.relative(logits(merged), logits(model)) <= 1e-5
    before = AutoModelForCausalLM.from_pretrained(bases[base])
    assert harness.relative(logits(before), logits(model)[..., :128]) > 1e-3
    assert not found.untied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == (base == "tied")
    assert merged.config.vocab_size == lora.get("rows", 128)
    in_memory = merged_state_dict(model, "dequantized", torch.float32)
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, in_memory[name], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("lora", UNTYING, ids=str)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_head_that_was_trained_apart_gets_weights_of_its_own(
    bases: dict[str, Path], tmp_path: Path, lora: dict[str, Any], streamed: bool
) -> None:
    """Catches a head that is written as its embedding, or an embedding that is changed along with the head."""
    model = adapted(bases["tied"], **lora)
    model.save_pretrained(tmp_path / "adapter")
    if streamed:
        assert merge_folders(bases["tied"], tmp_path / "out", adapter=tmp_path / "adapter", to="fp32").untied
    else:
        save_merged(model, tmp_path / "out", None, dtype=torch.float32)
    merged = loaded(tmp_path / "out")
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    assert harness.relative(logits(merged), logits(model)) <= 1e-5


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_merges_in_shards(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Catches fused projections, norms, biases and tied heads that are lost, and an index that misses a shard."""
    model = adapted(bases[family], target_modules=list(FAMILIES[family].targets))
    model.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    merge_folders(bases[family], out, adapter=tmp_path / "adapter", to="fp32", max_shard_size="100KB")
    assert len(list(out.glob("*.safetensors"))) > 2
    assert harness.relative(logits(loaded(out)), logits(model)) <= 1e-5


@pytest.mark.parametrize("to", ["bf16", "fp16"])
def test_sums_are_rounded_once(bases: dict[str, Path], tmp_path: Path, to: str) -> None:
    """Catches a sum in 16 bits. The fp32 sums of strips and of whole matrices may differ in their last bit."""
    model = adapted(bases["llama"])
    model.save_pretrained(tmp_path / "adapter")
    merge_folders(bases["llama"], tmp_path / "out", adapter=tmp_path / "adapter", to=to)
    written = load_file(tmp_path / "out" / "model.safetensors")
    exact = merged_state_dict(model, "dequantized", torch.float32)
    assert written.keys() == exact.keys()
    off = [(written[name] != exact[name].to(written[name].dtype)).float().mean().item() for name in exact]
    assert max(off) < 1e-3
    for name, value in exact.items():
        torch.testing.assert_close(written[name].float(), value, rtol=2**-8 if to == "bf16" else 2**-10, atol=1e-7)


@pytest.mark.parametrize("held", ["nf4", "int8"])
def test_the_base_as_training_saw_it(bases: dict[str, Path], tmp_path: Path, held: str) -> None:
    """Catches an adapter that is added to other values than it was trained beside: block borders, skipped layers."""
    load = {"load_in_4bit": held == "nf4", "load_in_8bit": held == "int8"}
    model, _ = FastLanguageModel.from_pretrained(str(bases["qwen2"]), **load)
    model = FastLanguageModel.get_peft_model(model, r=4)
    for parameter in harness.adapter(model).values():
        parameter.data += 0.1
    model.save_pretrained(tmp_path / "adapter")
    settings: dict[str, Any] = {"to": "fp32", "held": held, "computed": torch.float32, "device": "cpu"}
    merge_folders(bases["qwen2"], tmp_path / "out", adapter=tmp_path / "adapter", **settings)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in merged_state_dict(model, "dequantized", torch.float32).items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=2e-6)
    name = "model.layers.0.mlp.up_proj.weight"
    assert harness.relative(written[name], merged_state_dict(model, "original", torch.float32)[name]) > 1e-3


@pytest.mark.parametrize("held", ["nf4", "fp4", "int8"])
def test_a_base_stored_in_few_bits(bases: dict[str, Path], tmp_path: Path, held: str) -> None:
    """Catches packed bytes, or their states, that are taken for weights."""
    quantized = BitsAndBytesConfig(load_in_8bit=True)
    if held != "int8":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=held, bnb_4bit_use_double_quant=held == "nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        bases["llama"], quantization_config=quantized, dtype=torch.float32, device_map={"": "cpu"}
    )
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", to="fp32", device="cpu")
    written = load_file(tmp_path / "out" / "model.safetensors")
    exact = merged_state_dict(model, "dequantized", torch.float32)
    assert written.keys() == exact.keys()
    for name, value in exact.items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=2e-6)
    loaded(tmp_path / "out")


def test_4_bits_are_those_of_transformers(bases: dict[str, Path], tmp_path: Path) -> None:
    """Catches another layout, or other codes, than a model has that transformers quantizes and saves itself."""
    adapted(bases["gemma2"]).save_pretrained(tmp_path / "adapter")
    both = {to: tmp_path / to for to in ("bf16", "nf4")}
    for to, out in both.items():
        merge_folders(bases["gemma2"], out, adapter=tmp_path / "adapter", to=to, device="cpu", max_shard_size="50KB")
    ours = loaded(both["nf4"], device_map={"": "cpu"})
    theirs = AutoModelForCausalLM.from_pretrained(
        both["bf16"], quantization_config=ours.config.quantization_config, device_map={"": "cpu"}
    )
    expected = merged_state_dict(theirs, "dequantized", torch.float32)
    found = merged_state_dict(ours, "dequantized", torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    index = json.loads((both["nf4"] / "model.safetensors.index.json").read_text())
    assert saved.keys() == index["weight_map"].keys()


def test_all_that_a_model_needs_comes_along(bases: dict[str, Path], tmp_path: Path) -> None:
    """Catches the base's tokenizer in place of the adapter's, whose template the model was trained on."""
    model = adapted(bases["llama"])
    model.save_pretrained(tmp_path / "adapter")
    out, plain = tmp_path / "out", tmp_path / "plain"
    merge_folders(bases["llama"], plain, adapter=tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(plain)("w9 w40")["input_ids"] == [9, 40]
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_folders(bases["llama"], out, adapter=tmp_path / "adapter")
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert loaded(out).config.dtype == torch.bfloat16
    assert (out / "generation_config.json").read_bytes() == (bases["llama"] / "generation_config.json").read_bytes()


def test_an_older_export_is_replaced_whole(bases: dict[str, Path], tmp_path: Path) -> None:
    """Catches a single file of an older export that is read in place of the new shards."""
    out = tmp_path / "out"
    merge_folders(bases["qwen3"], out)
    merge_folders(bases["llama"], out, to="fp32", max_shard_size="100KB")
    assert torch.equal(logits(loaded(out)), logits(AutoModelForCausalLM.from_pretrained(bases["llama"])))


def _rewrite(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path, Path], None]:
    def plant(base: Path, adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return plant


def _configure(**fields: Any) -> Callable[[Path, Path], None]:
    def plant(base: Path, adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return plant


def _key(part: str) -> Callable[[dict[str, Tensor]], str]:
    return lambda tensors: next(name for name in tensors if part in name)


def _cut(base: Path, adapter: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lose_a_weight(base: Path, adapter: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def _say_another_size(base: Path, adapter: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 256}))


FAULTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "an adapter that diverged": (
        _rewrite(lambda t: t[_key("lora_B")(t)].fill_(float("nan"))),  # type: ignore[arg-type, return-value]
        "not finite",
    ),
    "half a pair": (_rewrite(lambda t: t.pop(_key("lora_B")(t))), "lora_B.weight is missing"),  # type: ignore[arg-type, return-value]
    "the other half": (_rewrite(lambda t: t.pop(_key("lora_A")(t))), "does not account for"),  # type: ignore[arg-type, return-value]
    "a layer that the base lacks": (
        _rewrite(lambda t: t.update({k.replace("layers.1", "layers.7"): t.pop(k) for k in list(t)})),
        "which the base lacks",
    ),
    "another width": (
        _rewrite(lambda t: t.update({_key("q_proj.lora_A")(t): torch.ones(4, 32)})),
        "is for \\(64, 32\\), the weight is \\(64, 64\\)",
    ),
    "magnitudes that the config does not know": (
        _rewrite(lambda t: t.update({_key("lora_A")(t).replace("A.weight", "magnitude_vector"): torch.ones(64)})),
        "does not account for",
    ),
    "DoRA without magnitudes": (_configure(use_dora=True), "lora_magnitude_vector is missing"),
    "another kind of adapter": (_configure(peft_type="IA3"), "kind IA3"),
    "an adapter that changed its base": (_configure(init_lora_weights="pissa"), "changed the base's weights"),
    "a field that means something else": (_configure(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "a base cut short": (_cut, "cut short"),
    "a base that lacks a weight": (_lose_a_weight, "lack 1 of the model's weights, model.norm.weight"),
    "a config of another model": (_say_another_size, "by config.json"),
}


@pytest.fixture(scope="module")
def pair(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter that fit together."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(bases["llama"], folder / "base")
    adapted(folder / "base").save_pretrained(folder / "adapter")
    merge_folders(folder / "base", folder / "out", adapter=folder / "adapter")
    return folder


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_found_before_anything_is_written(pair: Path, tmp_path: Path, fault: str) -> None:
    plant, message = FAULTS[fault]
    base, adapter = (shutil.copytree(pair / name, tmp_path / name) for name in ("base", "adapter"))
    plant(base, adapter)
    with pytest.raises(WhetError, match=message):
        merge_folders(base, tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "q4"}, "unknown format 'q4'"),
        ({"held": "fp4"}, "unknown holding 'fp4'"),
        ({"max_shard_size": "many"}, "'many' is not a size"),
        ({"adapter": Path("/nowhere")}, "adapter_config.json"),
        ({"base": "someone/model-of-the-hub"}, "must be on this machine"),
    ],
)
def test_arguments_that_can_not_be_had(
    bases: dict[str, Path], tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(WhetError, match=re.escape(message)):
        merge_folders(**{"base": bases["llama"], "out": tmp_path / "out"} | arguments)
    assert not any(tmp_path.iterdir())


def test_numbers_too_large_for_fp16_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Catches infinities in an export that bf16 would have held."""
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merge_folders(base, tmp_path / "bf16", to="bf16")
    with pytest.raises(WhetError, match=r"model.norm.weight holds numbers too large for torch.float16"):
        merge_folders(base, tmp_path / "fp16", to="fp16")
    assert not (tmp_path / "fp16").exists()


@pytest.mark.parametrize("to", ["bf16", "nf4"])
def test_no_tensor_is_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    """Catches a whole tensor, or a shard, that is read or kept: the largest read and the largest write are a strip."""
    monkeypatch.setattr(merge_files, "STRIP", 4096)
    base = write_checkpoint(tmp_path / "base", "llama", vocab_size=5000)
    sizes: list[int] = []

    class Watched(merge_files.ShardWriter):
        def write(self, name: str, rows: Tensor, start: int = 0) -> None:
            sizes.append(rows.numel())
            super().write(name, rows, start)

    class WatchedFiles(merge_files.TensorFiles):
        def rows(self, name: str, start: int, stop: int) -> Tensor:
            found = super().rows(name, start, stop)
            sizes.append(found.numel())
            return found

    monkeypatch.setattr("whet.export.merge_formats.ShardWriter", Watched)
    monkeypatch.setattr("whet.export.merge_stream.TensorFiles", WatchedFiles)
    merge_folders(base, tmp_path / "out", to=to)
    assert max(sizes) <= 4096
    assert sum(sizes) > 2 * 5000 * 64 * 2  # what is read and what is written, embedding and head
