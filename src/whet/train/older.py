"""What every trainer of whet does before TRL's constructor runs: `OlderTrainer`, put in front of TRL's class.

- `tokenizer=` is `processing_class=`; settings given to the trainer (max_seq_length, packing, beta, ...) go into its
  config, under today's names; `args=` may be a plain TrainingArguments;
- on a model that whet loaded, the longest row is `model.max_seq_length`, and layers are recomputed in the backward pass
  as the model was told to, unless the arguments say otherwise; the adapter stays in fp32, which TRL rounds to bf16;
- nothing is sent: TRL reports over the network that a trainer was made.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import transformers
from bitsandbytes.optim import AdamW, GlobalOptimManager
from peft import PeftModel
from torch import nn

from whet.models import activations, attention, fused
from whet.train.arguments import OLDER_ARGUMENTS, TRL_MAY_DECIDE, given_names, translate
from whet.train.optimizer import NAMES, AdamW8bit

Arguments = dict[str, Any]


class OlderTrainer:
    """Put before a TRL trainer, takes older arguments and follows the model's own settings."""

    config_class: ClassVar[type]
    _name: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parameters = list(inspect.signature(super().__init__).parameters)
        arguments: Arguments = dict(zip(parameters, args, strict=False)) | kwargs
        if "tokenizer" in arguments:
            tokenizer = arguments.pop("tokenizer")
            arguments["processing_class"] = arguments.get("processing_class") or tokenizer
        settings = {name: arguments.pop(name) for name in list(arguments) if name not in parameters}
        model = arguments.get("model")
        config = self._config(model, arguments.get("args"), settings)
        self._follow(model, config)
        self._adjust(config, arguments)
        with _adapter_kept(model), _false_warnings_hidden(model):
            super().__init__(**{**arguments, "args": config})

    @classmethod
    def _config(cls, model: Any, args: transformers.TrainingArguments | None, settings: Arguments) -> Any:
        """A config of this trainer: that of `args`, and `settings` over it. `args` itself is left as it is."""
        names = {field.name for field in dataclasses.fields(cls.config_class)}
        for name in settings:
            if name not in names and name not in OLDER_ARGUMENTS:
                raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}")
        settings = translate({name: value for name, value in settings.items() if value is not None}, names)
        if args is None:
            return cls.config_class(**{"output_dir": f"{_model_name(model)}-{cls._name}", **settings})
        given = given_names(args)
        if isinstance(args, cls.config_class.__bases__[-1]) and not settings:
            config = copy.copy(args)
        else:
            config = cls.config_class(**(_values(args, given) | settings))
        config._given = given | settings.keys()
        return config

    @staticmethod
    def _follow(model: Any, config: Any) -> None:
        """Take the longest row and recomputation from a model that whet loaded, unless the user said otherwise."""
        longest = getattr(model, "max_seq_length", None)
        if longest is None:
            return
        given = given_names(config)
        if "logging_nan_inf_filter" not in given:
            config.logging_nan_inf_filter = False  # waits for every batch, and would log the mean in the place of a NaN
        if "accelerator_config" not in given and config.dataloader_pin_memory:
            config.accelerator_config.non_blocking = True  # else each batch waits for all work before it
        if hasattr(config, "max_length") and "max_length" not in given:
            config.max_length = longest
        if "gradient_checkpointing" not in given:
            for name in ("gradient_checkpointing", "activation_checkpointing"):
                if hasattr(config, name):
                    setattr(config, name, False)  # transformers then leaves the model as it is
        elif not config.gradient_checkpointing:
            _keep_activations(model)

    def _adjust(self, config: Any, arguments: Arguments) -> None:
        """What one trainer needs beyond the rest."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; in the place of bitsandbytes' AdamW in 8 bits, one with few launches.

        transformers makes the optimizer first: it also tells bitsandbytes which weights keep moments of 32 bits. That
        is taken over, and forgotten there, where it would hold the model's embeddings for as long as the process lives.
        """
        given = self.optimizer is not None
        registered = GlobalOptimManager.get_instance().module_weight_config_triple
        before = len(registered)
        made = super().create_optimizer(*args, **kwargs)
        ours = hasattr(self.model, "max_seq_length") and self.args.optim in NAMES
        if ours and not given and type(made) is AdamW and made.args.optim_bits == 8:
            self.optimizer = AdamW8bit.like(made)
            del registered[before:]
        return self.optimizer

    def _send_telemetry(self) -> None:
        """Nothing. TRL's method of this name reports the trainer, the model and the hardware to its makers."""


def _model_name(model: Any) -> str:
    return Path(model if isinstance(model, str) else model.config._name_or_path or "model").name


def _values(args: transformers.TrainingArguments, given: frozenset[str]) -> Arguments:
    """Every field of `args`, for a config of another class."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.init}
    for name in TRL_MAY_DECIDE:
        if name not in given:
            values.pop(name, None)
    if values.get("steps_per_generation") is not None:
        values.pop("generation_batch_size")  # GRPO works out one of the two from the other and refuses to be given both
    return values


def _keep_activations(model: Any) -> None:
    shared = fused.shared_of(model)
    if shared is not None:
        shared.policy, shared.layers, shared.auto = activations.ALL, None, False
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # transformers 5.24 renamed the method
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    disable()


@contextmanager
def _adapter_kept(model: Any) -> Iterator[None]:
    """Give the trainable weights of a whet model back the values that TRL rounds to bf16 on a quantized base."""
    ours = isinstance(model, nn.Module) and hasattr(model, "max_seq_length")
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad] if ours else []
    yield
    for parameter, data in kept:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)


@contextmanager
def _false_warnings_hidden(model: Any) -> Iterator[None]:
    """TRL 1.15 warns that packed documents may see each other unless attention has a name it knows. Not in ours."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != attention.NAME:
        yield
        return
    logger = logging.getLogger("trl.trainer.sft_trainer")

    def is_true(record: logging.LogRecord) -> bool:
        return "supported Flash Attention variant" not in record.getMessage()

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)
