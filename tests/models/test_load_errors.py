"""What can be wrong with a model's folder or with the arguments: each a WhetError that names the place and the fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from whet import FastLanguageModel
from whet.errors import WhetError
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
