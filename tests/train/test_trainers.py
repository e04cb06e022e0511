"""The six trainers on a model that whet loaded: TRL's own, and whet's with older arguments."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
import trl.trainer.base_trainer
from bitsandbytes.optim import AdamW
from datasets import Dataset
from trl.experimental import orpo

import whet
from tests.train.setups import TEXTS, common
from whet.kernels import flash4
from whet.train import trainers

PAIRS = {
    "prompt": [f"What does parser {i} read?" for i in range(4)],
    "chosen": [f" It reads argument {i}." for i in range(4)],
    "rejected": [" I do not know."] * 4,
}
ROWS = {
    "SFT": {"text": TEXTS},
    "DPO": PAIRS,
    "ORPO": PAIRS,
    "Reward": PAIRS,
    "KTO": {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False, True, False]},
    "GRPO": {"prompt": PAIRS["prompt"]},
}
METHODS = list(ROWS)


def reward_by_place(completions: list[str], **kwargs: Any) -> list[float]:
    """Rewards that differ within a group, whatever was generated."""
    return [float(i) for i in range(len(completions))]


def method_arguments(method: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What the method's config, trainer and model need beyond the rest."""
    if method == "GRPO":
        return {"num_generations": 2, "max_completion_length": 4}, {"reward_funcs": reward_by_place}, {}
    return {}, {}, {"num_labels": 1} if method == "Reward" else {}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def recomputes(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# ---------------------------------------------------------------- all six


@pytest.mark.parametrize("method", METHODS)
def test_trl_s_own_trainer_runs_on_a_whet_model(
    method: str, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "1")  # TRL reports its use over the network, but for this
    for_config, for_trainer, for_model = method_arguments(method)
    model, tokenizer = load(**for_model)
    module = orpo if method == "ORPO" else trl
    # TRL rounds what is trained on a quantized base to bf16; a classifier's head then needs autocast.
    precision = {"bf16": method == "Reward", "use_cpu": True}
    config = getattr(module, f"{method}Config")(**common(tmp_path, **precision, **for_config))
    before = _trained(model)
    trainer = getattr(module, f"{method}Trainer")(
        model=model, args=config, train_dataset=_rows(method), processing_class=tokenizer, **for_trainer
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert _changed(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_whet_s_trainer_takes_older_arguments(method: str, load: Callable[..., Any], tmp_path: Path) -> None:
    for_config, for_trainer, for_model = method_arguments(method)
    model, tokenizer = load(**for_model)
    before = _trained(model)
    trainer = getattr(whet, f"{method}Trainer")(
        model=model,
        tokenizer=tokenizer,
        train_dataset=_rows(method),
        args=transformers.TrainingArguments(**common(tmp_path, learning_rate=1e-2)),
        **for_config,
        **for_trainer,
    )
    trainer.train()
    assert trainer.processing_class is tokenizer
    assert isinstance(trainer.args, getattr(whet, f"{method}Config"))
    assert trainer.args.learning_rate == 1e-2
    assert getattr(trainer.args, "max_length", 64) == 64, "the model's, not TRL's 1024"
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert _changed(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_argument_is_a_type_error_that_names_it(
    method: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="max_sequence_length"):
        getattr(whet, f"{method}Trainer")(model="unused", max_sequence_length=64)


def _rows(method: str) -> Dataset:
    return Dataset.from_dict(ROWS[method])


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().float() for name, p in model.named_parameters() if p.requires_grad}


def _changed(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in _trained(model).items())


# ---------------------------------------------------------------- what SFTTrainer does with its arguments


@pytest.mark.parametrize(
    ("argument", "value", "field"),
    [
        ("max_seq_length", 48, "max_length"),
        ("dataset_text_field", "text", "dataset_text_field"),
        ("packing", True, "packing"),
        ("dataset_num_proc", 1, "dataset_num_proc"),
        ("neftune_noise_alpha", 5.0, "neftune_noise_alpha"),
        ("eval_packing", False, "eval_packing"),
        ("dataset_kwargs", {}, "dataset_kwargs"),
    ],
)
def test_a_setting_given_to_the_trainer_reaches_the_config(
    argument: str, value: Any, field: str, make: Callable[..., Any]
) -> None:
    assert getattr(make(**{argument: value}).args, field) == value


def test_preference_settings_given_to_the_trainer_reach_the_config(
    load: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load()
    with caplog.at_level(logging.WARNING, logger="whet"):
        trainer = whet.DPOTrainer(
            model,
            None,
            beta=0.3,
            loss_type="ipo",
            max_length=40,
            max_prompt_length=20,
            label_smoothing=None,
            train_dataset=_rows("DPO"),
            tokenizer=tokenizer,
            args=whet.TrainingArguments(**common(tmp_path)),
        )
    assert (trainer.args.beta, trainer.args.loss_type, trainer.args.max_length) == (0.3, ["ipo"], 40)
    assert "max_prompt_length has no effect" in caplog.text


def test_the_reference_adapter_of_dpo_starts_equal(load: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a reference in another precision than the adapter it is a copy of: the first loss would not be log 2."""
    model, tokenizer = load()
    trainer = whet.DPOTrainer(
        model, train_dataset=_rows("DPO"), tokenizer=tokenizer, args=whet.TrainingArguments(**common(tmp_path))
    )
    for name, p in model.named_parameters():
        if ".default." in name:
            assert torch.equal(p, model.get_parameter(name.replace(".default.", ".ref."))), name
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)


def test_the_user_s_arguments_are_left_as_they_are(make: Callable[..., Any], tmp_path: Path) -> None:
    args = trl.SFTConfig(**common(tmp_path, use_cpu=True, bf16=False))
    before = args.to_dict()
    trainer = make(args=args)
    assert trainer.args is not args
    assert args.to_dict() == before


def test_max_seq_length_is_the_model_s_unless_given(make: Callable[..., Any], tmp_path: Path) -> None:
    assert make().args.max_length == 64
    assert make(args=whet.SFTConfig(**common(tmp_path, max_length=1024))).args.max_length == 1024
    assert make(args=whet.SFTConfig(**common(tmp_path, max_length=None))).args.max_length is None
    assert make(args=trl.SFTConfig(**common(tmp_path, bf16=False))).args.max_length == 64


@pytest.mark.parametrize(
    ("of_model", "given", "expected"),
    [("whet", None, True), (False, None, False), ("whet", False, False), (False, True, True)],
)
@pytest.mark.parametrize("kind", [whet.TrainingArguments, whet.SFTConfig])
def test_recomputation_is_as_the_model_was_told_unless_given(
    kind: type, of_model: bool | str, given: bool | None, expected: bool, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Catches TRL's default, gradient_checkpointing=True, recomputing layers of a model that was told not to."""
    args = kind(**common(tmp_path, max_steps=1, **({} if given is None else {"gradient_checkpointing": given})))
    trainer = make(checkpointing=of_model, args=args)
    trainer.train()
    assert recomputes(trainer.model) == expected


def test_a_plain_model_is_left_to_trl(tiny_llama: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    trainer = whet.SFTTrainer(
        model, whet.SFTConfig(**common(tmp_path)), train_dataset=_rows("SFT"), tokenizer=tokenizer
    )
    assert trainer.args.max_length == trl.SFTConfig.max_length
    assert trainer.args.gradient_checkpointing


def test_grpo_keeps_the_columns_that_rewards_read(load: Callable[..., Any], tmp_path: Path) -> None:
    """Catches remove_unused_columns=True, transformers' default, coming along with plain TrainingArguments."""
    seen: list[str] = []

    def reward(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
        seen.extend(answer)
        return reward_by_place(completions)

    model, tokenizer = load()
    trainer = whet.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=whet.TrainingArguments(**common(tmp_path, max_steps=1)),
        num_generations=2,
        max_completion_length=4,
        train_dataset=Dataset.from_dict({"prompt": PAIRS["prompt"], "answer": PAIRS["chosen"]}),
        tokenizer=tokenizer,
    )
    trainer.train()
    assert set(seen) <= set(PAIRS["chosen"])
    assert seen


def test_the_8_bit_optimizer_of_older_scripts_trains_on_a_cpu(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make(args=whet.TrainingArguments(**common(tmp_path, optim="adamw_8bit", learning_rate=1e-2)))
    before = _trained(trainer.model)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, AdamW)
    states = trainer.optimizer.optimizer.state.values()
    assert torch.uint8 in {state["state1"].dtype for state in states}, "moments in 8 bits"
    assert _changed(trainer.model, before)


def test_nothing_is_reported_to_trl_s_makers(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda *args, **kwargs: sent.append(args))
    make()
    assert not sent


@pytest.mark.parametrize("packing", [False, True])
def test_the_losses_are_trl_s_own(
    packing: bool, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the bit: whet's head sums over the vocabulary in another order than TRL's, in fp32 as well."""
    monkeypatch.setenv("CI", "1")
    settings = common(tmp_path, max_length=64, packing=packing, max_steps=3, learning_rate=1e-2, bf16=False)
    histories = []
    for trainer_class, config_class in ((trl.SFTTrainer, trl.SFTConfig), (whet.SFTTrainer, whet.SFTConfig)):
        model, tokenizer = load("16bit")
        rows = Dataset.from_dict({"text": TEXTS})
        trainer = trainer_class(model, config_class(**settings), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        histories.append(losses(trainer))
    assert histories[1] == pytest.approx(histories[0], rel=1e-6)
    assert len(set(histories[0])) == 3


@pytest.mark.parametrize("counted", ["all", "non_padding"])
@pytest.mark.parametrize("packing", [False, True])
def test_tokens_are_counted_as_transformers_counts_them(
    packing: bool, counted: str, load: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows of equal length, so that TRL pads none: catches a count of fill, or of each pass twice."""
    model, tokenizer = load("16bit")
    rows = Dataset.from_dict({"input_ids": [list(range(4, 68))] * 16})
    settings = common(tmp_path, max_length=64, packing=packing, gradient_accumulation_steps=2, bf16=False)
    seen = []
    for trainer_class, config_class in ((trl.SFTTrainer, trl.SFTConfig), (whet.SFTTrainer, whet.SFTConfig)):
        config = config_class(**settings, include_num_input_tokens_seen=counted)
        trainer = trainer_class(model, config, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        seen.append([line["num_input_tokens_seen"] for line in trainer.state.log_history])
    assert seen[1] == seen[0]
    assert seen[0][:2] == [256, 512]


def test_the_adapter_is_not_rounded(load: Callable[..., Any], tmp_path: Path) -> None:
    """Catches TRL's cast of a quantized model's adapter to bf16, which loses small updates."""
    model, tokenizer = load("4bit")
    before = _trained(model)
    whet.SFTTrainer(model, tokenizer=tokenizer, train_dataset=_rows("SFT"), args=whet.SFTConfig(**common(tmp_path)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])


def test_flash_attention_4_is_imported_while_the_trainer_is_made(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches seconds of import in the time of loading a model, or of the first step."""
    asked: list[str] = []
    monkeypatch.setattr(flash4, "prepare", lambda: asked.append("now"))
    model, tokenizer = load()
    assert asked == []
    whet.SFTTrainer(model, tokenizer=tokenizer, train_dataset=_rows("SFT"), args=whet.SFTConfig(**common(tmp_path)))
    assert asked == ["now"]


def test_configs_have_the_fields_of_trl_s() -> None:
    for config in (trainers.SFTConfig, trainers.ORPOConfig, trainers.GRPOConfig):
        assert dataclasses.fields(config) == dataclasses.fields(config.__bases__[-1])
