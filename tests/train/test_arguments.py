"""Older names of training arguments, and precisions on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from whet.errors import WhetError
from whet.train import trainers
from whet.train.arguments import OLDER_ARGUMENTS, TrainingArguments, given_names

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


@pytest.mark.parametrize(
    ("older", "value", "field", "now"),
    [
        ("evaluation_strategy", "steps", "eval_strategy", "steps"),
        ("evaluate_during_training", True, "eval_strategy", "steps"),
        ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size", 3, "per_device_eval_batch_size", 3),
        ("warmup_ratio", 0.25, "warmup_steps", 0.25),
        ("no_cuda", True, "use_cpu", True),
        ("adafactor", True, "optim", "adafactor"),
        ("adafactor", False, "optim", transformers.TrainingArguments.optim),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
        ("include_inputs_for_metrics", True, "include_for_metrics", ["inputs"]),
        ("include_tokens_per_second", True, "include_num_input_tokens_seen", "non_padding"),
        ("push_to_hub_model_id", "me/model", "hub_model_id", "me/model"),
        ("push_to_hub_token", "secret", "hub_token", "secret"),
    ],
)
def test_an_older_name_reaches_its_field(older: str, value: Any, field: str, now: Any) -> None:
    assert getattr(TrainingArguments(**{older: value}), field) == now


def test_every_name_in_the_table_is_taken_by_some_class(caplog: pytest.LogCaptureFixture) -> None:
    """Catches an entry that translates to a field that transformers or TRL dropped in their turn."""
    classes = [TrainingArguments, trainers.SFTConfig, trainers.DPOConfig, trainers.GRPOConfig, trainers.ORPOConfig]
    for name in OLDER_ARGUMENTS:
        value = 0.5 if name == "warmup_ratio" else "no" if name == "evaluation_strategy" else False
        taken = [cls for cls in classes if _takes(cls, name, value)]
        assert taken, name


def _takes(cls: type, name: str, value: Any) -> bool:
    try:
        cls(**{name: value})
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("cls", [TrainingArguments, trainers.SFTConfig, trainers.GRPOConfig])
def test_an_unknown_name_is_a_type_error_that_names_it(cls: type) -> None:
    with pytest.raises(TypeError, match="warmup_ration"):
        cls(warmup_ration=0.1)


def test_a_name_of_a_config_is_unknown_to_plain_arguments() -> None:
    with pytest.raises(TypeError, match="max_seq_length"):
        TrainingArguments(max_seq_length=64)


def test_the_newer_name_wins_where_it_says_something() -> None:
    """Catches warmup_steps=0, which scripts pass beside warmup_ratio, switching the warm-up off."""
    assert TrainingArguments(warmup_steps=5, warmup_ratio=0.1).warmup_steps == 5
    assert TrainingArguments(warmup_steps=0, warmup_ratio=0.1).warmup_steps == 0.1
    assert TrainingArguments(use_cpu=False, no_cuda=True).use_cpu


def test_a_warmup_ratio_of_one_is_not_read_as_one_step() -> None:
    with pytest.raises(WhetError, match="warmup_ratio"):
        TrainingArguments(warmup_ratio=1.0)


@pytest.mark.parametrize("name", ["overwrite_output_dir", "logging_dir", "save_safetensors", "half_precision_backend"])
def test_a_name_without_effect_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="whet"):
        TrainingArguments(**{name: "x"})
    assert f"{name} has no effect" in caplog.text


def test_a_name_that_changed_the_loss_is_refused() -> None:
    with pytest.raises(WhetError, match="reference_free"):
        trainers.DPOConfig(reference_free=True)
    assert trainers.DPOConfig(reference_free=False).beta == 0.1


@on_cpu
@pytest.mark.parametrize("name", ["bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32"])
@pytest.mark.parametrize("cls", [TrainingArguments, trainers.SFTConfig])
def test_a_precision_that_a_cpu_lacks_is_replaced_and_said(
    cls: type, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="whet"):
        args = cls(**{name: True})
    assert not getattr(args, name)
    assert caplog.text.count(f"{name}=True") == 1
    assert args.mixed_precision == "no"


@on_cpu
def test_bf16_stays_where_the_cpu_was_asked_for() -> None:
    assert TrainingArguments(bf16=True, use_cpu=True).mixed_precision == "bf16"


@on_cpu
def test_a_config_left_alone_can_be_made_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    """Catches TRL's default of bf16, which transformers refuses without a GPU, and a warning nobody asked for."""
    with caplog.at_level(logging.WARNING, logger="whet"):
        assert trainers.SFTConfig().mixed_precision == "no"
    assert not caplog.text


def test_nothing_is_reported_unless_asked() -> None:
    assert TrainingArguments().report_to == []
    assert trainers.SFTConfig().report_to == []


@pytest.mark.parametrize("cls", [TrainingArguments, trainers.SFTConfig])
def test_arguments_are_saved_and_copied_like_the_original(cls: type, tmp_path: Path) -> None:
    args = cls(output_dir="somewhere", warmup_ratio=0.25, learning_rate=3e-4)
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).warmup_steps == 0.25
    assert dataclasses.replace(args, seed=5).warmup_steps == 0.25
    assert set(args.to_dict()) == set(cls.__bases__[-1]().to_dict() if cls is TrainingArguments else args.to_dict())
    (parsed,) = transformers.HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", "x", "--seed", "7"])
    assert parsed.seed == 7


def test_what_was_given_is_known() -> None:
    """Catches a default of TRL's, gradient_checkpointing=True, being taken for a wish of the user's."""
    assert "gradient_checkpointing" not in given_names(trainers.SFTConfig())
    assert "gradient_checkpointing" in given_names(trainers.SFTConfig(gradient_checkpointing=True))
    assert "gradient_checkpointing" in given_names(trainers.SFTConfig(activation_checkpointing=True))
    assert "gradient_checkpointing" not in given_names(transformers.TrainingArguments())
    assert "gradient_checkpointing" in given_names(transformers.TrainingArguments(gradient_checkpointing=True))
    assert "max_length" not in given_names(dataclasses.replace(trainers.SFTConfig(), seed=1))
    assert "max_length" in given_names(dataclasses.replace(trainers.SFTConfig(max_length=7), seed=1))
