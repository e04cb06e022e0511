"""Fused layers on a model: what stays as it was, and when a layer runs as transformers wrote it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.parity import harness
from tests.parity.families import SPLIT, write_checkpoint
from whet import FastLanguageModel
from whet.models import fused

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each layer that went through the block."""
    run, seen = fused.run, []

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[0])
        return run(*arguments)

    monkeypatch.setattr(fused, "run", counted)
    return seen


def adapted(folder: Path, **options: Any) -> PeftModel:
    model, _ = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=options.pop("load_in_4bit", True))
    return FastLanguageModel.get_peft_model(
        model, r=harness.RANK, lora_alpha=harness.ALPHA, target_modules=SPLIT, random_state=harness.SEED, **options
    ).train()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_saved_copied_and_loaded_again_it_is_the_same_model(llama: Path, tmp_path: Path, load_in_4bit: bool) -> None:
    """Catches weights that lie together and are saved, or copied, as each other."""
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama), load_in_4bit=load_in_4bit)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=load_in_4bit)
    copied = copy.deepcopy(model)
    for other in (again, copied):
        assert model.state_dict().keys() == other.state_dict().keys()
        assert torch.equal(model(IDS, use_cache=False).logits, other(IDS, use_cache=False).logits)
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in copied.parameters()}


def test_a_copy_has_the_settings_and_nothing_else(llama: Path) -> None:
    """Catches a copy that trains under another plan, or shares a batch's buffers with the model it was made of."""
    model, _ = FastLanguageModel.from_pretrained(str(llama), use_gradient_checkpointing=True, gpu_memory=3)
    shared = fused.shared_of(model)
    assert shared is not None
    shared.tile, shared.fp8, shared.gradient = 77, True, torch.ones(1)
    copied = fused.shared_of(copy.deepcopy(model))
    assert copied is not None
    assert copied is not shared
    names = ("policy", "layers", "tile", "fp8", "auto", "budget")
    assert [getattr(copied, name) for name in names] == [getattr(shared, name) for name in names]
    assert copied.gradient is None
    assert copied.rotary is not shared.rotary


def test_a_layer_is_still_what_it_was(llama: Path) -> None:
    """Catches code of transformers, or of a user, that looks for layers by class or name and finds none."""
    model, _ = FastLanguageModel.from_pretrained(str(llama))
    layer = model.model.layers[0]
    assert isinstance(layer, LlamaDecoderLayer)
    assert isinstance(layer, fused.FusedLayer)
    assert type(layer).__name__ == "FusedLlamaDecoderLayer"
    assert list(dict(layer.named_children())) == ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
    hidden = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
    assert len(hidden) == 3


def test_the_class_itself_is_left_alone(llama: Path) -> None:
    """Catches a block that has got into models which whet did not load."""
    FastLanguageModel.from_pretrained(str(llama))
    assert LlamaDecoderLayer.__mro__[1].__name__ == "GradientCheckpointingLayer"
    plain = harness.plain_model(llama, "llama", "fp32")
    assert fused.shared_of(plain) is None


GENERIC: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"lora_dropout": 0.1}, "LoRA dropout"),
    "dora": ({"use_dora": True}, "Dora adapters"),
    "bias": ({"lora_bias": True}, "a bias in the adapter"),
}


@pytest.mark.parametrize("name", GENERIC)
def test_other_adapters_train_on_the_generic_path_and_it_is_said_once(
    llama: Path, name: str, layers_run: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an adapter whose gradient the block would get wrong, or a path that is taken in silence."""
    options, reason = GENERIC[name]
    model = adapted(llama, **options)
    with caplog.at_level(logging.WARNING, logger="whet"):
        for _ in range(2):
            harness.run(model, {"input_ids": IDS, "labels": IDS})
    assert layers_run == []
    said = [record.getMessage() for record in caplog.records if "generic path" in record.getMessage()]
    assert said == [f"generic path, not the fused block: {reason}"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in harness.adapter(model).values())


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, "fused"),
        ({"lora_dropout": 0.1}, "generic: LoRA dropout"),
        ({"lora_dropout": 0.1, "layers_to_transform": [0]}, "fused, but for 1 of 2: LoRA dropout"),
    ],
)
def test_the_path_is_told(llama: Path, options: dict[str, Any], path: str) -> None:
    assert fused.path_of(adapted(llama, **options)) == path


def test_the_path_of_other_models_is_told(llama: Path) -> None:
    assert fused.path_of(harness.plain_model(llama, "llama", "fp32")) == "generic: another kind of layer"


def test_dropout_is_off_in_evaluation_and_the_block_on(llama: Path, layers_run: list[Any]) -> None:
    model = adapted(llama, lora_dropout=0.1).eval()
    model(IDS, use_cache=False)
    assert len(layers_run) == 2


@pytest.mark.parametrize("change", ["disabled", "merged", "two", "hook"])
def test_what_is_done_to_an_adapter_later_holds_in_the_block(llama: Path, change: str, layers_run: list[Any]) -> None:
    """Catches projections that are remembered from before the change."""
    ours = adapted(llama, load_in_4bit=False)
    theirs = harness.plain_model(llama, "llama", "fp32")
    for model in (ours, theirs):
        harness.randomise_adapter(model)
    ours(IDS, use_cache=False)
    assert len(layers_run) == 2
    for model in (ours, theirs):
        if change == "disabled":
            model.base_model.disable_adapter_layers()
        elif change == "merged":
            model.merge_adapter()
        elif change == "two":
            model.add_adapter("second", model.peft_config["default"])
            model.base_model.set_adapter(["default", "second"])
        else:
            q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
            q_proj.register_forward_hook(lambda module, args, output: output * 2)
    with torch.no_grad():
        logits = [model(IDS, use_cache=False).logits for model in (ours, theirs)]
    assert harness.relative(*logits) <= 1e-5
    blocks = {"disabled": 2, "merged": 0, "two": 0, "hook": 1}
    assert len(layers_run) - 2 == blocks[change]


def test_one_layer_s_adapter_leaves_the_others_frozen(llama: Path, layers_run: list[Any]) -> None:
    model = adapted(llama, layers_to_transform=[1])
    gradients = harness.run(model, {"input_ids": IDS, "labels": IDS}).gradients
    assert gradients
    assert all("layers.1." in name for name in gradients)
    assert len(layers_run) == 2


def test_attention_that_was_asked_for_runs_as_asked(llama: Path, layers_run: list[Any]) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(llama), attn_implementation="eager")
    model(IDS, use_cache=False)
    assert layers_run == []


def test_generation_uses_the_cache(llama: Path, layers_run: list[Any]) -> None:
    """Catches a block that runs over a prompt and leaves no keys behind."""
    model, _ = FastLanguageModel.from_pretrained(str(llama))
    FastLanguageModel.for_inference(model)
    cached = model.generate(IDS, max_new_tokens=4, do_sample=False)
    again = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)
    assert layers_run, "without a cache the block runs"


def test_checkpointing_as_transformers_does_it_changes_nothing(llama: Path, layers_run: list[Any]) -> None:
    """Catches a layer that transformers runs twice, though the block keeps what its backward reads."""
    model = adapted(llama)
    expected = harness.run(model, {"input_ids": IDS, "labels": IDS}).gradients
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers_run.clear()
    for name, gradient in harness.run(model, {"input_ids": IDS, "labels": IDS}).gradients.items():
        assert torch.equal(gradient, expected[name])
    assert len(layers_run) == 2


@pytest.mark.parametrize("recompute", [True, False, "unsloth"])
def test_the_first_layer_has_no_input_to_differentiate(
    llama: Path, recompute: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a product for the embedding's output, whose gradient nobody reads: transformers asks for it whenever
    anything is recomputed."""
    asked, backward = [], fused.Block.backward

    def spy(self: Any, *args: Any, input_grad: bool, **kwargs: Any) -> Any:
        asked.append(input_grad)
        return backward(self, *args, input_grad=input_grad, **kwargs)

    monkeypatch.setattr(fused.Block, "backward", spy)
    model, _ = FastLanguageModel.from_pretrained(str(llama), use_gradient_checkpointing=recompute)
    model = FastLanguageModel.get_peft_model(model, r=2, use_gradient_checkpointing=recompute)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=recompute)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert asked[-1] is False
    assert asked[:-1] == [True] * (len(asked) - 1) != []
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS, use_cache=False).loss.backward()
    assert embedded.grad is not None, "who asks for it gets it"


@pytest.mark.parametrize("family", ["opt"])
def test_a_model_of_another_kind_says_so(tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from tests.parity.families import word_tokenizer

    config = OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="whet"):
        model, _ = FastLanguageModel.from_pretrained(str(tmp_path), load_in_4bit=False)
    assert fused.shared_of(model) is None
    assert "generic path, not the fused block" in caplog.text
