"""What can be wrong with a model's folder or with the arguments: each a WhetError that names the place and the fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.parity.families import write_checkpoint
from whet import FastLanguageModel, language_model
from whet.errors import WhetError
from whet.kernels import fp8
from whet.models import fused
from whet.models.compute import check_compute, use_fp8
from whet.models.load import load

Broken = Callable[[], Path]


def refused(name: str | Path, **arguments: Any) -> WhetError:
    """The error that loading raises, which must name a place and a fix."""
    with pytest.raises(WhetError) as caught:
        FastLanguageModel.from_pretrained(str(name), **arguments)
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "one/two/three"])
def test_a_folder_that_is_not_there(name: str) -> None:
    """Catches a local path that is taken for a hub name and asked for over the network."""
    error = refused(name)
    assert "no model folder" in error.what
    assert error.where == name


def test_a_file_instead_of_a_folder(llama: Path) -> None:
    assert "no model folder" in refused(llama / "config.json").what


def test_a_folder_without_config(broken: Broken) -> None:
    folder = broken()
    (folder / "config.json").unlink()
    error = refused(folder)
    assert "config.json" in error.what
    assert error.where == str(folder)


def test_an_adapter_given_as_the_base(llama: Path, tmp_path: Path) -> None:
    """The most common mistake with adapters deserves its own advice."""
    base = AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "LoRA adapter" in str(refused(tmp_path).fix)


def test_a_config_that_is_not_json(broken: Broken) -> None:
    folder = broken()
    (folder / "config.json").write_text('{"model_type": "llama"')
    error = refused(folder)
    assert "not valid JSON" in error.what
    assert error.where == str(folder / "config.json")


def test_an_architecture_that_transformers_does_not_know(broken: Broken) -> None:
    assert "nonesuch" in refused(edit_config(broken(), model_type="nonesuch")).what


def test_weights_in_a_pickle_are_not_read(broken: Broken) -> None:
    """Catches a pickle being opened: this one would leave a file behind."""
    folder = broken()
    (folder / "model.safetensors").unlink()
    trace = folder / "opened"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    torch.save({"weight": Payload()}, folder / "pytorch_model.bin")
    error = refused(folder)
    assert "pickle (pytorch_model.bin)" in error.what
    assert "safetensors" in str(error.fix)
    assert not trace.exists()


def test_a_folder_without_weights(broken: Broken) -> None:
    folder = broken()
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refused(folder).what


@pytest.mark.parametrize("size", [0, 5000])
def test_weights_that_were_cut_short(broken: Broken, size: int) -> None:
    """Catches safetensors' own exception, which is neither an OSError nor a ValueError."""
    folder = broken()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "could not be read" in refused(folder).what


def test_weights_that_are_missing(broken: Broken) -> None:
    """Catches a layer that the files lack being filled with random numbers under a warning."""
    error = refused(edit_config(broken(), num_hidden_layers=3))
    assert "lack 9 of the model's weights" in error.what
    assert "model.layers.2" in error.what


def test_weights_of_another_shape(broken: Broken) -> None:
    error = refused(edit_config(broken(), vocab_size=256), load_in_4bit=False)
    assert "(128, 64) in the files but (256, 64)" in error.what


def test_a_vocabulary_larger_than_the_embedding(broken: Broken) -> None:
    """Catches an index out of range deep in the first training step."""
    folder = broken()
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"extra{i}": i for i in range(120, 140)}
    path.write_text(json.dumps(tokenizer))
    assert "140 tokens but the embedding only 128 rows" in refused(folder).what


def test_a_folder_without_a_tokenizer(broken: Broken) -> None:
    folder = broken()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "could not be read" in refused(folder).what


def test_an_unknown_builtin_lists_those_there_are() -> None:
    assert "builtin:tiny" in str(refused("builtin:nonesuch").fix)


def test_a_hub_name_without_a_network() -> None:
    """Catches a traceback from the hub's client; in a process of its own, because the client reads its switch once."""
    code = "import whet; whet.FastLanguageModel.from_pretrained('someone/some-model')"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=offline, check=False)
    last = "\n".join(done.stderr.splitlines()[-2:])
    assert "WhetError: someone/some-model: neither a local folder nor a model the hub would give" in last
    assert "HF_HUB_OFFLINE" in last


def test_an_unknown_dtype(llama: Path) -> None:
    error = refused(llama, dtype="float8")
    assert error.where == "dtype"
    assert "bfloat16" in str(error.fix)


def test_an_unknown_precision(llama: Path) -> None:
    with pytest.raises(WhetError, match="nf4, int8, 16bit, 32bit"):
        load(str(llama), precision="int4")


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"max_seq_length": 0}, "max_seq_length"),
        ({"max_seq_length": "2048"}, "max_seq_length"),
        ({"load_in_8bit": True, "load_in_16bit": True}, "load_in_8bit, load_in_16bit"),
        ({"use_gradient_checkpointing": "sometimes"}, "use_gradient_checkpointing"),
        ({"load_in_fp8": True}, "load_in_fp8"),
        ({"compute": "fp4"}, "compute"),
        ({"compute": "fp8", "full_finetuning": True}, 'compute="fp8"'),
        ({"compute": "fp8", "load_in_8bit": True}, 'compute="fp8"'),
        ({"compute": "fp8", "load_in_4bit": False}, 'compute="fp8"'),
        ({"fast_inference": True}, "fast_inference"),
        ({"qat_scheme": "int4"}, "qat_scheme"),
    ],
)
def test_arguments_that_can_not_be_had(llama: Path, arguments: dict[str, Any], where: str) -> None:
    """Catches a switch that is taken and ignored."""
    assert refused(llama, **arguments).where == where


@pytest.mark.parametrize("amount", ["lots", "24", 0, -3])
def test_an_amount_of_memory_that_is_none(tiny_llama: Path, amount: object) -> None:
    """Catches a budget that is found wrong only when training starts."""
    with pytest.raises(WhetError, match=r"gpu_memory.*24GiB"):
        FastLanguageModel.from_pretrained(str(tiny_llama), gpu_memory=amount)  # type: ignore[arg-type]


# ---------------------------------------------------------------- FP8


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, tuple[int, int]], None]]:
    """gpu(name, capability): torch says that this GPU is here."""

    def put(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        fp8.supported.cache_clear()

    yield put
    fp8.supported.cache_clear()


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any device is said to multiply in FP8. No product is computed under it."""
    monkeypatch.setattr(fp8, "supported", lambda device: True)


def refuse_fp8(call: Callable[[], Any]) -> WhetError:
    with pytest.raises(WhetError) as caught:
        call()
    assert caught.value.where == 'compute="fp8"'
    assert caught.value.fix
    return caught.value


def wide(folder: Path, **options: Any) -> Any:
    """A model whose every layer can have FP8, unless the options say otherwise."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return FastLanguageModel.from_pretrained(str(write_checkpoint(folder, "llama", **shape)), **options)[0]


def test_fp8_without_a_gpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches FP8's references trained with in silence, which is neither fast nor what was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU here" in refused(llama, compute="fp8").what


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_fp8_on_a_gpu_without_it_names_the_gpu(gpu: Any, llama: Path, capability: tuple[int, int]) -> None:
    """Catches a GPU that computes FP8 by the reference, slower than 16 bits: its kernels are Hopper's."""
    gpu("Some GPU", capability)
    assert f"here is Some GPU, {capability[0]}.{capability[1]}" in refused(llama, compute="fp8").what


def test_fp8_on_a_gpu_that_has_it(gpu: Any) -> None:
    """Catches a check that refuses everything, and one that leaves out the dtype of the products."""
    gpu("Some GPU", (9, 0))
    check_compute("fp8", "nf4")
    check_compute("fp8", "nf4", "bfloat16")
    assert "float32" in refuse_fp8(lambda: check_compute("fp8", "nf4", "float32")).what


def test_fp8_is_all_layers_or_an_error(everywhere: None, tmp_path: Path) -> None:
    """Catches FP8 that stays off, and that goes on where some or all layers would run in 16 bits."""
    model = wide(tmp_path)
    use_fp8(model)
    assert fused.shared_of(model).fp8

    plain = wide(tmp_path, attn_implementation="sdpa")
    assert "no layer of this model" in refuse_fp8(lambda: use_fp8(plain)).what
    half = wide(tmp_path)
    half.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert "hooks on a linear layer" in refuse_fp8(lambda: use_fp8(half)).what
    in_16_bits = wide(tmp_path, load_in_4bit=False)
    assert "must be NF4" in refuse_fp8(lambda: use_fp8(in_16_bits)).what
    assert not any(fused.shared_of(x).fp8 for x in (half, in_16_bits))


def test_fp8_is_switched_on_as_it_is_asked_for(
    everywhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a setting that is checked and then forgotten, and one that is on without being asked for."""
    monkeypatch.setattr(language_model, "check_compute", lambda *_, **__: None)  # which refuses it without a GPU
    assert fused.shared_of(wide(tmp_path, compute="fp8")).fp8
    assert not fused.shared_of(wide(tmp_path)).fp8


def test_fp8_of_weights_that_do_not_lie_together(everywhere: None, llama: Path) -> None:
    """Catches sizes that the fused block would send back to 16 bits under a line in the log."""
    model, _ = FastLanguageModel.from_pretrained(str(llama))
    error = refuse_fp8(lambda: use_fp8(model))
    assert error.what.startswith("model.layers.0 has a weight of 128x64")
    assert not fused.shared_of(model).fp8


def test_fp8_on_a_cpu_beside_a_gpu(gpu: Any, tmp_path: Path) -> None:
    """Catches a device_map that puts the base where FP8 is not."""
    model = wide(tmp_path, device_map="cpu")
    gpu("Some GPU", (9, 0))
    assert "the base is on cpu" in refuse_fp8(lambda: use_fp8(model)).what


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"lora_dropout": 0.1}, "LoRA dropout"), ({"use_dora": True}, "Dora"), ({"lora_bias": True}, "bias")],
)
def test_an_adapter_that_fp8_can_not_have(
    everywhere: None, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    """Catches an adapter that takes every layer off the fused block, and so out of FP8, once training starts."""
    model = wide(tmp_path)
    use_fp8(model)
    assert reason in refuse_fp8(lambda: FastLanguageModel.get_peft_model(model, r=4, **options)).what


def test_an_adapter_that_fp8_can_have(everywhere: None, tmp_path: Path) -> None:
    """Catches a check of adapters that refuses all of them, or leaves the model in another mode."""
    model = wide(tmp_path)
    use_fp8(model)
    modes = [module.training for module in model.model.layers[0].mlp.up_proj.modules()]
    peft_model = FastLanguageModel.get_peft_model(model, r=4)
    assert fused.shared_of(peft_model).fp8
    assert [module.training for module in model.model.layers[0].mlp.up_proj.base_layer.modules()] == modes
