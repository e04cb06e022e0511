"""Merging: the folder alone, in plain transformers, computes what base and adapter computed together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parity import harness
from tests.parity.families import FAMILIES, write_checkpoint
from whet import FastLanguageModel
from whet.errors import WhetError
from whet.export.merge import merged_state_dict, save_merged

IDS = torch.tensor([[5, 9, 17, 33, 40, 3, 77, 101, 64, 21, 8]])
LOADS = {
    "fp32": {"load_in_4bit": False},
    "bf16": {"load_in_4bit": False, "dtype": torch.bfloat16},
    "nf4": {"load_in_4bit": True},
    "int8": {"load_in_4bit": False, "load_in_8bit": True},
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def adapted(folder: Path, load: str = "fp32", **lora: Any) -> Any:
    """A whet model whose adapter, and everything else that trains, has moved away from where it starts."""
    model, _ = FastLanguageModel.from_pretrained(str(folder), **LOADS[load])
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, "lora_alpha": 8} | lora)
    generator = torch.Generator().manual_seed(3)
    for parameter in harness.adapter(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def plain(folder: Path, **options: Any) -> Any:
    """The folder in transformers alone, which must find every weight it wants and no other."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


def far(model: Any, folder: Path, **options: Any) -> float:
    return harness.relative(logits(plain(folder, **options)), logits(model))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "down_proj"]},
        {"layers_to_transform": [1]},
        {"bias": "lora_only"},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=str,
)
def test_merged_logits_in_fp32(llama: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    """Catches a wrong scale, a dropped DoRA magnitude, a trained copy of a module that stays behind."""
    model = adapted(llama, **lora)
    save_merged(model, tmp_path / "out", None, dtype=torch.float32)
    assert far(model, tmp_path / "out") <= 1e-5
    assert far(adapted(llama, r=8), tmp_path / "out") > 1e-2  # another adapter: the comparison can fail


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("load", ["fp32", "nf4"])
def test_every_family_merges(tmp_path: Path, family: str, load: str) -> None:
    """Catches biases, norms, fused projections or tied embeddings lost between the model and the folder."""
    model = adapted(write_checkpoint(tmp_path / "base", family), load, target_modules=FAMILIES[family].targets)
    save_merged(model, tmp_path / "out", None, dtype=torch.float32)
    assert far(model, tmp_path / "out") <= 1e-5


def test_a_tied_embedding_stays_tied(tmp_path: Path) -> None:
    """Catches a head written beside the embedding it shares, or lost with it."""
    model = adapted(write_checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True))
    save_merged(model, tmp_path / "out", None, dtype=torch.float32)
    assert far(model, tmp_path / "out") <= 1e-5
    merged = plain(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("load", list(LOADS))
def test_16_bits_round_once(llama: Path, tmp_path: Path, load: str) -> None:
    """Catches a sum taken in bf16: each weight must be the fp32 sum, rounded to bf16 once."""
    model = adapted(llama, load)
    model.save_pretrained_merged(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    exact = merged_state_dict(model, "dequantized", torch.float32)
    assert written.keys() == exact.keys()
    assert all(torch.equal(written[name], exact[name].bfloat16()) for name in exact)
    assert far(model, tmp_path / "out", dtype=torch.float32) <= 0.05


def test_a_model_without_an_adapter_is_written_as_it_is(llama: Path, tmp_path: Path) -> None:
    """Full fine-tuning ends here too."""
    model, _ = FastLanguageModel.from_pretrained(str(llama), full_finetuning=True)
    save_merged(model, tmp_path / "out", None, dtype=torch.float32)
    source, written = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert source.keys() == written.keys()
    assert all(torch.equal(source[name], written[name]) for name in source)


@pytest.mark.parametrize("load", ["nf4", "int8"])
def test_the_two_bases(llama: Path, tmp_path: Path, load: str) -> None:
    """Catches the two names for the base meaning the same, or the other way round."""
    model = adapted(llama, load)
    source = load_file(llama / "model.safetensors")
    seen = merged_state_dict(model, "dequantized", torch.float32)
    original = merged_state_dict(model, "original", torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    delta = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")
    torch.testing.assert_close(original[name], source[name] + delta, rtol=1e-6, atol=1e-6)
    off = harness.relative(seen[name] - delta, source[name])
    assert 1e-3 < off < (0.12 if load == "nf4" else 0.02)  # what the quantization loses
    assert torch.equal(original["model.norm.weight"], source["model.norm.weight"])


def test_the_original_base_must_be_known(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama, "nf4")
    model.config._name_or_path = ""
    with pytest.raises(WhetError, match="does not know where it was loaded from"):
        save_merged(model, tmp_path / "out", None, base="original")
    assert not any(tmp_path.iterdir())


def test_4_bits(llama: Path, tmp_path: Path) -> None:
    """Catches 16-bit weights left in the folder, and a folder that plain transformers does not load as NF4."""
    model = adapted(llama, "nf4")
    _, tokenizer = FastLanguageModel.from_pretrained(str(llama))
    model.save_pretrained_merged(tmp_path / "out", tokenizer, save_method="merged_4bit")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_use_double_quant"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert merged.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert harness.relative(logits(merged.train()), logits(model)) < 0.3  # quantized anew, with the adapter in it
    ours, _ = FastLanguageModel.from_pretrained(str(tmp_path / "out"))
    assert harness.relative(logits(ours), logits(model)) < 0.3


def test_the_adapter_alone(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama)
    model.save_pretrained_merged(tmp_path / "out", save_method="lora")
    assert sorted(p.name for p in tmp_path.joinpath("out").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert harness.relative(logits(loaded), logits(model)) <= 1e-5


def test_the_tokenizer_and_settings_come_along(llama: Path, tmp_path: Path) -> None:
    """Catches a folder that needs its base's files, a cache left off, and shards that are not listed."""
    _, tokenizer = FastLanguageModel.from_pretrained(str(llama))
    model = adapted(llama)
    model.save_pretrained_merged(tmp_path / "out", tokenizer, max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w9 w40")["input_ids"] == [9, 40]
    assert plain(tmp_path / "out").config.use_cache


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"method": "merged"}, "save_method"),
        ({"base": "16bit"}, "base"),
        ({"method": "lora"}, "save_method='lora'"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"max_shard_size": "big"}, "max_shard_size"),
    ],
)
def test_arguments_that_can_not_be_had(llama: Path, tmp_path: Path, arguments: dict[str, Any], where: str) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(llama))
    with pytest.raises(WhetError) as caught:
        save_merged(model, tmp_path / "out", None, **arguments)
    assert caught.value.where == where
    assert not any(tmp_path.iterdir())


CUT_SHORT = """
import resource, sys
from pathlib import Path
from whet import FastLanguageModel
from whet.export.merge import save_merged
model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], load_in_4bit=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # the weights take 200 KB; config and tokenizer fit
for folder in sys.argv[2:]:
    try:
        save_merged(model, Path(folder), tokenizer, method=Path(folder).name)
    except Exception as error:
        print("failed:", error)
"""


def test_a_failure_in_the_middle_leaves_nothing_half_written(llama: Path, tmp_path: Path) -> None:
    """Catches a folder that looks whole after the disk ran full, and an older export that is lost to the attempt."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama), load_in_4bit=False)
    folders = [tmp_path / state / method for state in ("old", "new") for method in ("merged_16bit", "merged_4bit")]
    for folder in folders[:2]:
        save_merged(model, folder, tokenizer)
    before = [_contents(folder) for folder in folders]
    command = [sys.executable, "-c", CUT_SHORT, str(llama), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("failed:") == 4, done.stdout
    assert [_contents(folder) for folder in folders] == before
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["merged_16bit", "merged_4bit"]
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("first", "second"), [("100KB", "1GB"), ("1GB", "100KB"), ("100KB", "150KB")])
def test_an_export_replaces_an_older_one_whole(llama: Path, tmp_path: Path, first: str, second: str) -> None:
    """Catches weights of an older export, in one file or in shards, that stay and are read in place of the new ones."""
    out = tmp_path / "out"
    save_merged(adapted(llama), out, None, dtype=torch.float32, max_shard_size=first)
    (out / "notes.txt").write_text("mine")
    model = adapted(llama, use_rslora=True)
    save_merged(model, out, None, dtype=torch.float32, max_shard_size=second)
    save_merged(model, tmp_path / "fresh", None, dtype=torch.float32, max_shard_size=second)
    assert far(model, out) <= 1e-5
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()} | {"notes.txt"}


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("evaluate", [False, True])
def test_evaluating_first_changes_no_merge(llama: Path, evaluate: bool) -> None:
    """Catches weights that an evaluation repacked being read as NF4."""
    model = adapted(llama, "nf4")
    expected = merged_state_dict(adapted(llama, "nf4"), "dequantized", torch.float32)
    if evaluate:
        logits(FastLanguageModel.for_inference(model))
    found = merged_state_dict(model, "dequantized", torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_adapters_are_both_merged(llama: Path, tmp_path: Path) -> None:
    """Catches a second active adapter left out of the sum."""
    model = adapted(llama)
    other: Callable[..., Any] = adapted(llama, r=8).save_pretrained
    other(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "second")
    model.base_model.set_adapter(["default", "second"])
    save_merged(model, tmp_path / "out", None, dtype=torch.float32)
    assert far(model, tmp_path / "out") <= 1e-5
