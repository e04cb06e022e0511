"""Loading: how the base is held in memory, what it computes in, and that evaluating it changes neither."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel

from tests.parity import harness
from whet import FastLanguageModel
from whet.models.load import pick_dtype

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
BATCH = {"input_ids": torch.tensor([[5, 9, 17, 33, 40, 3, 77]]), "labels": torch.tensor([[5, 9, 17, 33, 40, 3, 77]])}


def nf4_bytes(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor of a 4-bit model by name: packed codes and all parts of their quantization state."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state.as_dict(packed=True)
            tensors |= {f"{name}.weight.{key}": value for key, value in state.items()}
    return tensors


def assert_same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_own_layout(llama: Path, dtype: torch.dtype) -> None:
    """Catches another block size, a missing double quantization, or a quantized head."""
    ours, _ = FastLanguageModel.from_pretrained(str(llama), load_in_4bit=True, dtype=dtype)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=nf4, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in nf4_bytes(ours).items()}
    assert sum("nested_absmax" in name for name in before) == 14
    assert_same_bytes(before, nf4_bytes(theirs))
    FastLanguageModel.for_inference(ours)
    with torch.no_grad():
        ours(**BATCH)
    assert_same_bytes(before, nf4_bytes(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_after_an_evaluation_gets_the_same_gradients(llama: Path, dtype: torch.dtype) -> None:
    """Catches weights that an evaluation repacks for a kernel without a gradient, as bitsandbytes does on some CPUs."""
    base = "nf4" if dtype == torch.float32 else "nf4-bf16"
    fresh, evaluated = (harness.whet_model(llama, "llama", base) for _ in range(2))
    for model in (fresh, evaluated):
        harness.randomise_adapter(model)
    FastLanguageModel.for_inference(evaluated)
    with torch.no_grad():
        evaluated(**BATCH)
    FastLanguageModel.for_training(evaluated)
    expected, found = (harness.run(model, BATCH) for model in (fresh, evaluated))
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(found.gradients[name], g) for name, g in expected.gradients.items())


def test_evaluation_and_training_compute_the_same(llama: Path) -> None:
    """Catches an evaluation that measures another arithmetic than the one being trained.

    With a cache the layers' own modules run, without one the fused block: the same function, rounded elsewhere.
    """
    model = harness.whet_model(llama, "llama", "nf4")
    with torch.no_grad():
        training = model.train()(**BATCH).logits
        evaluation = FastLanguageModel.for_inference(model)(**BATCH).logits
    assert harness.relative(training, evaluation) <= 1e-5


def test_an_8_bit_base_trains(llama: Path) -> None:
    """Catches an 8-bit base whose adapter gets no gradient, or whose steps lead nowhere."""
    model, _ = FastLanguageModel.from_pretrained(str(llama), load_in_4bit=False, load_in_8bit=True)
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, Linear8bitLt)
    assert linear.weight.dtype == torch.int8
    model = FastLanguageModel.get_peft_model(model, r=4).train()
    losses = five_steps(model)
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in harness.adapter(model).values())


def test_full_finetuning_trains_every_weight(llama: Path) -> None:
    """Catches a base that stays quantized or frozen when the whole of it was to be trained."""
    model, _ = FastLanguageModel.from_pretrained(str(llama), load_in_4bit=True, full_finetuning=True)
    assert all(p.requires_grad and p.is_floating_point() for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = five_steps(model.train())
    assert losses[-1] < 0.9 * losses[0]
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged


def five_steps(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(harness.run(model, BATCH).loss.item())
        optimizer.step()
    return losses


@no_gpu
@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, torch.float32),
        ("float16", torch.float32),
        (torch.float16, torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_the_dtype_on_a_cpu(asked: Any, given: torch.dtype) -> None:
    """Catches fp16 on a CPU, where training overflows, and bf16 chosen unasked, where it is slow."""
    assert pick_dtype(asked) == given


@no_gpu
def test_a_replaced_dtype_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="whet"):
        pick_dtype("float16")
    assert "float32 instead" in caplog.text


@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_a_16_bit_base_is_held_as_asked(llama: Path, dtype: torch.dtype, held: torch.dtype) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(llama), load_in_4bit=False, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {held}


def test_a_classifier_starts_with_a_new_head(llama: Path) -> None:
    """Catches a reward model refused because its one new layer is not in the files, and that layer in 4 bits."""
    model, _ = FastLanguageModel.from_pretrained(str(llama), num_labels=1)
    assert model.score.weight.is_floating_point()
    assert model(input_ids=BATCH["input_ids"]).logits.shape == (1, 1)


def test_a_tokenizer_without_padding_pads_with_its_end(broken: Any) -> None:
    """Catches a batch that can't be padded."""
    from transformers import AutoTokenizer

    folder = broken()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    _, loaded = FastLanguageModel.from_pretrained(str(folder), max_seq_length=99)
    assert loaded.pad_token == "</s>"
    assert loaded.model_max_length == 99
