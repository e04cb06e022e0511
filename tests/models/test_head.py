"""whet's output head in the SFT trainer: the numbers of TRL's head and of the model's logits, from labelled rows."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig
from trl.trainer.utils import add_fused_lm_head

import whet
from tests.parity.families import write_checkpoint
from tests.train.setups import common
from whet.models import head
from whet.models.head import DIVIDED, MULTIPLIED, PLAIN, SOFTCAPPED, LinearLogProbs, use_fused_head

LENGTH = 60
FIELDS = ("log_probs", "entropy", "is_top1")
# model type of each class that the head knows, and what sets its logits apart
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "CohereForCausalLM": ("cohere", {"logit_scale": 0.3}),
    "Cohere2ForCausalLM": ("cohere2", {"logit_scale": 0.3}),
    "GemmaForCausalLM": ("gemma", {}),
    "Gemma2ForCausalLM": ("gemma2", {"final_logit_softcapping": 2.0}),
    "Gemma3ForCausalLM": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "GraniteForCausalLM": ("granite", {"logits_scaling": 3.0}),
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {}),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Phi3ForCausalLM": ("phi3", {}),
    "PhiForCausalLM": ("phi", {}),
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", {}),
    "SmolLM3ForCausalLM": ("smollm3", {}),
    "Starcoder2ForCausalLM": ("starcoder2", {}),
}


def small(name: str, **options: Any) -> Any:
    """A random one-layer model of a class of MODELS, its head frozen and biased where the class has a bias."""
    kind, own = MODELS[name]
    shape = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape | own | options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.get_output_embeddings().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad_(False)
    return model


def with_heads(model: Any) -> Any:
    add_fused_lm_head(model, outputs=FIELDS)
    use_fused_head(model)
    return model


def batch(rows: int = 3, labelled: float = 0.2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (rows, 20), generator=generator)
    ignored = torch.rand(ids.shape, generator=generator) >= labelled
    return {"input_ids": ids, "labels": ids.masked_fill(ignored, -100)}


@pytest.fixture
def rows_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of whet's head got; nothing is added where TRL's head answers."""
    seen: list[int] = []

    def counted(h: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(h))
        return linear_log_probs(h, *args, **kwargs)

    linear_log_probs = head.linear_log_probs
    monkeypatch.setattr(head, "linear_log_probs", counted)
    return seen


# ---------------------------------------------------------------- one model


def test_each_class_that_the_head_knows_is_tested() -> None:
    assert set(MODELS) == PLAIN | SOFTCAPPED | MULTIPLIED | DIVIDED


@pytest.mark.parametrize("name", MODELS)
def test_the_fields_are_those_of_the_model_s_own_logits(name: str, rows_seen: list[int]) -> None:
    """Catches a class that scales, caps or shifts its logits in another way than the head."""
    model = small(name)
    inputs = batch()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    mask = labels != -100
    log_p = torch.log_softmax(logits, -1)
    expected = {
        "log_probs": log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * mask,
        "entropy": -(log_p.exp() * log_p).sum(-1) * mask,
        "is_top1": (logits.argmax(-1) == labels) & mask,
    }
    found = with_heads(model)(**inputs, fused_lm_head=True)
    assert rows_seen == [int(mask.sum())]
    assert torch.equal(found.label_mask, mask)
    assert torch.equal(found.is_top1, expected["is_top1"])
    for field in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(found, field), expected[field], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, model(**inputs).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("items", [None, 7])
def test_the_output_is_trl_s_field_by_field(shifted: bool, items: int | None, rows_seen: list[int]) -> None:
    """Catches another shape, dtype or field than TRL's, and labels that were shifted twice."""
    inputs = batch()
    if shifted:
        inputs["shift_labels"] = inputs.pop("labels")
    model = small("LlamaForCausalLM")
    add_fused_lm_head(model, outputs=FIELDS)
    expected = model(**inputs, fused_lm_head=True, num_items_in_batch=items)
    use_fused_head(model)
    found = model(**inputs, fused_lm_head=True, num_items_in_batch=items)
    assert len(rows_seen) == 1
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for field in expected:
        torch.testing.assert_close(found[field], expected[field], rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_label_gives_zeros_and_zero_gradients() -> None:
    """Catches 0 / 0, and a loss that is cut off from the model: backward() would fail."""
    model = with_heads(small("LlamaForCausalLM"))
    output = model(**batch(labelled=0.0), fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0
    assert not output.log_probs.any()
    gradients = [p.grad for p in model.model.layers.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_a_batch_without_a_label_trains_the_head_by_zero() -> None:
    """Catches a gradient of the head that is whatever lay in memory."""
    model = with_heads(small("LlamaForCausalLM"))
    model.lm_head.weight.requires_grad_(True)
    model(**batch(labelled=0.0), fused_lm_head=True).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert not model.lm_head.weight.grad.any()


def test_the_gradient_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows whose gradient goes to another position, or is not scaled by its own upstream gradient."""
    monkeypatch.setattr(head, "BACKWARD_ROWS", 3)
    h = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64)
    rows = torch.tensor([7, 0, 3, 8, 1])
    labels = torch.tensor([0, 10, 4, 4, 2])
    bias = torch.randn(11, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h: LinearLogProbs.apply(h, rows, weight, labels, bias, 2.0, 0.7, True)[0], h)


@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_of_a_trained_head_in_fp64(biased: bool) -> None:
    """Catches rows of h that pair with another row's label, upstream gradient or lse; each row has its own weight."""
    generator = torch.Generator().manual_seed(0)
    h, weight, bias, upstream = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((9, 5), (11, 5), (11,), (5,))
    )
    rows = torch.tensor([7, 0, 3, 8, 1])
    labels = torch.tensor([0, 10, 4, 4, 2])

    def loss(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return LinearLogProbs.apply(h, rows, weight, labels, bias, 2.0, 0.7, True)[0] * upstream

    leaves = [x.requires_grad_() for x in ((h, weight, bias) if biased else (h, weight))]
    assert torch.autograd.gradcheck(loss, leaves)
    whole = torch.autograd.grad(loss(*leaves).sum(), leaves)
    for i in range(len(leaves)):  # one of them alone
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(leaves)]
        (gradient,) = torch.autograd.grad(loss(*alone).sum(), alone[i])
        assert torch.equal(gradient, whole[i])


def test_gradients_taken_twice_are_the_same() -> None:
    """Catches a backward pass that writes into what it kept."""
    h, weight = torch.randn(6, 32, requires_grad=True), torch.randn(90, 32, requires_grad=True)
    log_probs, *_ = LinearLogProbs.apply(h, torch.arange(6), weight, torch.arange(6), None, None, 1.0, True)
    first = torch.autograd.grad(log_probs.sum(), (h, weight), retain_graph=True)
    again = torch.autograd.grad(log_probs.sum(), (h, weight))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_a_weight_that_changed_before_the_backward_pass_is_an_error() -> None:
    """Catches logits made again from another weight than the loss was."""
    h, weight = torch.randn(6, 32), torch.randn(90, 32, requires_grad=True)
    log_probs, *_ = LinearLogProbs.apply(h, torch.arange(6), weight, torch.arange(6), None, None, 1.0, True)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def test_a_frozen_head_keeps_no_rows_of_h() -> None:
    """Catches memory and time spent for a gradient that nobody asked for."""
    kept: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel() if x.is_floating_point() else 0)
        return x

    h, weight = torch.randn(6, 32, requires_grad=True), torch.randn(90, 32)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        LinearLogProbs.apply(h, torch.arange(6), weight, torch.arange(6), None, None, 1.0, True)
    assert sum(kept) == 6 * 32


@pytest.mark.parametrize("grad", [False, True])
def test_evaluation_pays_for_no_gradient(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation that computes gradients because the weights want them."""
    asked: list[Any] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        asked.append((kwargs["need_grad"], kwargs["need_lse"]))
        return linear_log_probs(*args, **kwargs)

    linear_log_probs = head.linear_log_probs
    monkeypatch.setattr(head, "linear_log_probs", recorded)
    model = with_heads(small("LlamaForCausalLM")).requires_grad_(True)
    with torch.set_grad_enabled(grad):
        model(**batch(), fused_lm_head=True)
    assert asked == [(grad, grad)]


def test_a_trained_head_under_autocast() -> None:
    """fp32 weights, the product in bf16. Catches gradients in another dtype than their weight's, or far off."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(6, 32, generator=generator, requires_grad=True)
    weight = torch.randn(90, 32, generator=generator, requires_grad=True)
    bias = torch.randn(90, generator=generator, requires_grad=True)
    rows = labels = torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, *_ = LinearLogProbs.apply(h, rows, weight, labels, bias, None, 1.0, True)
    found = torch.autograd.grad(log_probs.sum(), (h, weight, bias))
    exact = torch.log_softmax(h @ weight.T + bias, -1)[rows, labels]
    for ours, truth in zip(found, torch.autograd.grad(exact.sum(), (h, weight, bias)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 0.02 * truth.norm()


def test_under_autocast_the_product_is_taken_in_its_dtype() -> None:
    """Catches a product in fp32 (slow on a GPU), and gradients of an fp32 model that are rounded to bf16 twice."""
    h = torch.randn(6, 32, requires_grad=True)
    weight, labels, rows = torch.randn(90, 32), torch.arange(6), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, entropy, _ = LinearLogProbs.apply(h, rows, weight, labels, None, None, 1.0, True)
        expected = torch.log_softmax((h @ weight.T).float(), -1)[rows, labels]
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=1e-6, atol=1e-6)
    (whole,) = torch.autograd.grad(log_probs.sum(), h, retain_graph=True)
    (third,) = torch.autograd.grad((log_probs * 0.3).sum(), h)
    assert third.dtype == torch.float32
    assert torch.equal(third, whole * 0.3)


def test_the_entropy_is_for_reading_only() -> None:
    """Catches an entropy that claims a gradient but has none: a loss with it would train as if without."""
    model = with_heads(small("LlamaForCausalLM"))
    output = model(**batch(), fused_lm_head=True)
    assert output.log_probs.requires_grad
    assert not output.entropy.requires_grad


# ---------------------------------------------------------------- what the model still does


def test_without_the_fused_head_the_model_is_as_before(rows_seen: list[int]) -> None:
    model = small("LlamaForCausalLM")
    inputs = batch()
    keys = list(model.state_dict())
    before = model(**inputs)
    written = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    class_forward = type(model).forward
    with_heads(model)
    after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), written)
    assert list(model.state_dict()) == keys
    assert type(model).forward is class_forward
    assert not rows_seen


def test_a_copy_of_the_model_uses_its_own_weights() -> None:
    """Catches a forward that goes on reading the weights of the model it was made for."""
    model = with_heads(small("LlamaForCausalLM"))
    other = copy.deepcopy(model)
    other.lm_head.weight.data.zero_()
    inputs = batch()
    assert not other(input_ids=inputs["input_ids"]).logits.any()
    assert model(input_ids=inputs["input_ids"]).logits.any()
    found = other(**inputs, fused_lm_head=True)
    torch.testing.assert_close(found.loss, torch.tensor(90.0).log())
    other.lm_head.weight.requires_grad_(True)
    other(**inputs, fused_lm_head=True).loss.backward()
    assert other.lm_head.weight.grad.any()
    assert model.lm_head.weight.grad is None
    other.lm_head.__class__ = type("Head", (torch.nn.Linear,), {})  # TRL's head answers
    torch.testing.assert_close(other(**inputs, fused_lm_head=True).loss, torch.tensor(90.0).log())


# ---------------------------------------------------------------- where TRL's head stays


def unknown_class() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPTNeoXConfig(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).requires_grad_(False)


def own_class() -> Any:
    """A class outside transformers that goes by a known name."""
    model = small("LlamaForCausalLM")
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "elsewhere"})
    return model


def other_head() -> Any:
    model = small("LlamaForCausalLM")

    class Head(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Head
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (unknown_class, "GPTNeoXForCausalLM may scale its logits"),
        (own_class, "LlamaForCausalLM may scale its logits"),
        (other_head, "the head is a Head, not a plain linear layer"),
    ],
)
def test_trl_s_head_stays_where_ours_does_not_apply_and_that_is_said_once(
    make: Callable[[], Any], reason: str, rows_seen: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    add_fused_lm_head(model, outputs=FIELDS)
    inputs = batch()
    expected = model(**inputs, fused_lm_head=True)
    use_fused_head(model)
    with caplog.at_level(logging.INFO, logger="whet"):
        found = [model(**inputs, fused_lm_head=True) for _ in range(2)]
    assert not rows_seen
    assert torch.equal(found[1].log_probs, expected.log_probs)
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_model_without_trl_s_head_is_left_as_it_is() -> None:
    model = small("LlamaForCausalLM")
    use_fused_head(model)
    assert "forward" not in vars(model)


# ---------------------------------------------------------------- in the trainer


def labelled_rows(labelled: float) -> Dataset:
    """Four rows of token ids; of the second no token has a label."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 120, (4, LENGTH), generator=generator)
    ignored = torch.rand(ids.shape, generator=generator) >= labelled
    ignored[1] = True
    ignored[0, 5] = False  # at least one label, however few there are
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.masked_fill(ignored, -100).tolist()})


def step(
    kind: Any, folder: Path, out: Path, labelled: float, lora: dict[str, Any] | str | None = None, **settings: Any
) -> tuple[float, dict[str, float], dict[str, torch.Tensor], Any]:
    """Loss, metrics and gradients of one batch by trainer `kind`, in fp32, and the trainer.

    lora: options of the adapter; "full" trains every weight instead.
    """
    model, tokenizer = whet.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, load_in_4bit=False, full_finetuning=lora == "full"
    )
    if not isinstance(lora, str):
        model = whet.FastLanguageModel.get_peft_model(model, r=4, **lora or {})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradients
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    config = (trl if kind is trl.SFTTrainer else whet).SFTConfig(
        **common(out, per_device_train_batch_size=4, max_length=None, bf16=False, gradient_checkpointing=False)
        | settings
    )
    trainer = kind(model=model, args=config, train_dataset=labelled_rows(labelled), processing_class=tokenizer)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(9))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return loss.item(), metrics, gradients, trainer


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("labelled", [1.0, 0.02])
@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}, {"padding_free": True}])
def test_the_trainer_s_numbers_are_those_of_trl_s_head(
    family: str,
    labelled: float,
    settings: dict[str, Any],
    tmp_path: Path,
    rows_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches labels off by one, rows without labels that count, a lost soft cap, and gradients at wrong positions.

    gemma2's soft cap of 3 lies well inside the spread of its logits. dft weighs each row differently.
    """
    monkeypatch.setenv("CI", "1")  # TRL's own trainer reports its use over the network, but for this
    folder = write_checkpoint(tmp_path / "model", family)
    loss, metrics, gradients, _ = step(trl.SFTTrainer, folder, tmp_path, labelled, **settings)
    assert not rows_seen
    our_loss, our_metrics, our_gradients, trainer = step(whet.SFTTrainer, folder, tmp_path, labelled, **settings)
    labels = torch.tensor(trainer.train_dataset["labels"])
    assert rows_seen == [int((labels[:, 1:] != -100).sum())]
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert our_metrics == pytest.approx(metrics, rel=1e-6)
    assert {"entropy", "mean_token_accuracy"} <= our_metrics.keys()
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gemma2", True), ("gemma2", False)])
@pytest.mark.parametrize("labelled", [1.0, 0.02])
@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}])
def test_full_fine_tuning_gives_trl_s_numbers(
    family: str,
    tied: bool,
    labelled: float,
    settings: dict[str, Any],
    tmp_path: Path,
    rows_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a head without its gradient, and one that takes the place of a tied embedding's instead of adding to it.

    dft weighs each row by its probability, so that its gradient is not that of the sum of the rows.
    """
    monkeypatch.setenv("CI", "1")
    folder = write_checkpoint(tmp_path / "model", family, tie_word_embeddings=tied)
    loss, metrics, gradients, _ = step(trl.SFTTrainer, folder, tmp_path, labelled, "full", **settings)
    assert not rows_seen
    our_loss, our_metrics, our_gradients, trainer = step(
        whet.SFTTrainer, folder, tmp_path, labelled, "full", **settings
    )
    assert rows_seen == [int((torch.tensor(trainer.train_dataset["labels"])[:, 1:] != -100).sum())]
    model = trainer.model
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert our_metrics == pytest.approx(metrics, rel=1e-6)
    assert our_gradients.keys() == gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_head_in_modules_to_save_trains_as_by_trl_s(
    tmp_path: Path, rows_seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a head in modules_to_save that silently gets no gradient, or whose frozen original makes the logits."""
    monkeypatch.setenv("CI", "1")
    folder = write_checkpoint(tmp_path / "model", "llama")
    lora = {"modules_to_save": ["lm_head"]}
    loss, _, gradients, _ = step(trl.SFTTrainer, folder, tmp_path, 1.0, lora)
    assert not rows_seen
    our_loss, _, our_gradients, trainer = step(whet.SFTTrainer, folder, tmp_path, 1.0, lora)
    assert len(rows_seen) == 1
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert any("lm_head" in name and gradient.any() for name, gradient in our_gradients.items())
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    wrapper = trainer.model.get_base_model().get_output_embeddings()
    assert head._head(trainer.model.get_base_model()) is wrapper.modules_to_save["default"]
    with trainer.model.disable_adapter():
        assert head._head(trainer.model.get_base_model()) is wrapper.original_module


def test_an_adapter_that_trl_makes_gets_our_head_too(tmp_path: Path, rows_seen: list[int]) -> None:
    folder = write_checkpoint(tmp_path / "model", "llama")
    model, tokenizer = whet.FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_4bit=False)
    trainer = whet.SFTTrainer(
        model=model,
        args=whet.SFTConfig(**common(tmp_path, max_length=None)),
        train_dataset=labelled_rows(1.0),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    assert len(rows_seen) == 2
