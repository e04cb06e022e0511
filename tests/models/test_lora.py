"""Adapters: what PEFT is told, and what is refused before it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from whet import FastLanguageModel
from whet.errors import WhetError
from whet.models.lora import linear_names

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def base(llama: Path, **options: Any) -> Any:
    return FastLanguageModel.from_pretrained(str(llama), **options)[0]


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_4bit": False}, {"load_in_8bit": True}])
def test_all_linear_is_every_layer_but_the_head(llama: Path, bits: dict[str, bool]) -> None:
    """Catches layers of a quantized base that are not counted as linear, and an adapter on the head."""
    model = base(llama, **bits)
    assert linear_names(model) == ALL
    peft_model = FastLanguageModel.get_peft_model(model, r=4)
    assert isinstance(peft_model, PeftModel)
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in peft_model.named_parameters() if "lora_A" in name
    }
    assert sorted(adapted) == ALL


def test_only_the_adapter_is_trained(llama: Path) -> None:
    model = FastLanguageModel.get_peft_model(base(llama, load_in_4bit=False), r=4)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_the_seed_decides_the_adapter(llama: Path) -> None:
    """Catches an adapter that two runs of one recipe draw differently."""
    first, again, other = (
        FastLanguageModel.get_peft_model(base(llama), r=4, random_state=seed).state_dict() for seed in (1, 1, 2)
    )
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_layers_are_picked_by_number(llama: Path) -> None:
    """Catches "all-linear" and layers_to_transform, which PEFT does not take together."""
    model = FastLanguageModel.get_peft_model(base(llama), r=4, layers_to_transform=[1])
    adapted = {name.split(".layers.")[1][0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"1"}


def test_rank_stabilised_scaling(llama: Path) -> None:
    """alpha / sqrt(r) instead of alpha / r."""
    model = FastLanguageModel.get_peft_model(base(llama), r=16, lora_alpha=8, use_rslora=True)
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"r": 0}, "r"),
        ({"r": -4}, "r"),
        ({"r": True}, "r"),
        ({"r": "16"}, "r"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"target_modules": ["q_proj", "w_proj"]}, "target_modules"),
        ({"target_modules": ["proj"]}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"target_modules": "q_prj"}, "get_peft_model"),
        ({"layers_to_transform": [7]}, "get_peft_model"),
        ({"bias": "some"}, "get_peft_model"),
        ({"rank": 8}, "get_peft_model"),
        ({"finetune_attention_modules": False}, "finetune_*"),
        ({"use_gradient_checkpointing": "maybe"}, "use_gradient_checkpointing"),
    ],
)
def test_settings_that_can_not_be_had(llama: Path, arguments: dict[str, Any], where: str) -> None:
    """Catches a setting that is taken and ignored, and a fault that comes out as PEFT's traceback."""
    with pytest.raises(WhetError) as caught:
        FastLanguageModel.get_peft_model(base(llama), **arguments)
    assert caught.value.where == where
    assert caught.value.fix


def test_unknown_targets_are_named_beside_those_there_are(llama: Path) -> None:
    with pytest.raises(WhetError, match=r"no layer named w_proj[^$]*q_proj, up_proj, v_proj"):
        FastLanguageModel.get_peft_model(base(llama), target_modules=["q_proj", "w_proj"])


def test_a_second_adapter_is_refused(llama: Path) -> None:
    """Catches an adapter on an adapter, which PEFT allows with a warning."""
    model = FastLanguageModel.get_peft_model(base(llama), r=4)
    with pytest.raises(WhetError, match="has an adapter already"):
        FastLanguageModel.get_peft_model(model, r=4)


def test_inference_and_training_modes(llama: Path) -> None:
    """Catches recomputation left on in generation, or the cache left on in training."""
    model = FastLanguageModel.get_peft_model(base(llama), r=4, use_gradient_checkpointing="unsloth")
    model = FastLanguageModel.for_training(model, use_gradient_checkpointing="unsloth")
    assert model.training
    assert model.get_base_model().is_gradient_checkpointing
    assert not model.config.use_cache
    assert FastLanguageModel.for_inference(model) is model
    assert not model.training
    assert not model.get_base_model().is_gradient_checkpointing
    assert model.config.use_cache
