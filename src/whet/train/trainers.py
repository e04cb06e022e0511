"""TRL's trainers, which also take the arguments that scripts were written with: TRL's own behind `OlderTrainer`."""

from __future__ import annotations

import warnings

import trl

from whet.train.arguments import OlderArguments
from whet.train.older import OlderTrainer
from whet.train.sft import SFTConfig, SFTTrainer

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental import orpo

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]


class DPOConfig(OlderArguments, trl.DPOConfig):
    """trl.DPOConfig that also takes older names, such as max_prompt_length."""


class KTOConfig(OlderArguments, trl.KTOConfig):
    """trl.KTOConfig that also takes older names."""


class ORPOConfig(OlderArguments, orpo.ORPOConfig):
    """trl.experimental.orpo.ORPOConfig that also takes older names."""


class GRPOConfig(OlderArguments, trl.GRPOConfig):
    """trl.GRPOConfig that also takes older names, such as max_prompt_length."""


class RewardConfig(OlderArguments, trl.RewardConfig):
    """trl.RewardConfig that also takes older names."""


class DPOTrainer(OlderTrainer, trl.DPOTrainer):
    """Learns from pairs of a chosen and a rejected answer. See trl.DPOTrainer."""

    config_class = DPOConfig


class KTOTrainer(OlderTrainer, trl.KTOTrainer):
    """Learns from single answers marked good or bad. See trl.KTOTrainer."""

    config_class = KTOConfig


class ORPOTrainer(OlderTrainer, orpo.ORPOTrainer):
    """Learns from pairs without a reference model. See trl.experimental.orpo.ORPOTrainer."""

    config_class = ORPOConfig


class GRPOTrainer(OlderTrainer, trl.GRPOTrainer):
    """Learns from rewards of its own answers. See trl.GRPOTrainer."""

    config_class = GRPOConfig


class RewardTrainer(OlderTrainer, trl.RewardTrainer):
    """Trains a classifier with one output to score answers. See trl.RewardTrainer."""

    config_class = RewardConfig
