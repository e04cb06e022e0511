"""TRL's trainers, which also take the arguments that scripts were written with.

Each class below is TRL's own with `OlderTrainer` in front, which does this before TRL's constructor runs:

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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import trl
from bitsandbytes.optim import AdamW
from peft import PeftModel
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from whet.models import activations, attention, fused
from whet.models.head import use_fused_head
from whet.plan.fit import fit_to_memory
from whet.train.arguments import OLDER_ARGUMENTS, TRL_MAY_DECIDE, OlderArguments, given_names, translate
from whet.train.collator import PaddingFree, nearly_whole
from whet.train.formatting import FormattingFunction, formatted
from whet.train.optimizer import AdamW8bit
from whet.train.pass_graph import PassGraph, obstacle

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
    from trl.experimental import orpo

log = logging.getLogger("whet")

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
        """transformers' own; in the place of bitsandbytes' AdamW in 8 bits, one of the same results with few launches.

        transformers makes the optimizer first: it also tells bitsandbytes which weights keep moments of 32 bits.
        """
        given = self.optimizer is not None
        made = super().create_optimizer(*args, **kwargs)
        ours = hasattr(self.model, "max_seq_length") and self.args.optim in ("adamw_8bit", "adamw_bnb_8bit")
        if ours and not given and type(made) is AdamW and made.args.optim_bits == 8:
            self.optimizer = AdamW8bit.like(made)
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


# ---------------------------------------------------------------- the six


class SFTConfig(OlderArguments, trl.SFTConfig):
    """trl.SFTConfig that also takes older names, such as max_seq_length."""


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


MEASURED = ("entropy", "mean_token_accuracy")  # in each pass, beside its loss


def _tokens(inputs: Arguments) -> int:
    """Of a padding-free batch, without those that fill it up."""
    return int(inputs["position_ids"].numel()) - int(inputs.get("fill", 0))


class SFTTrainer(OlderTrainer, trl.SFTTrainer):
    """Learns to continue text, or to answer. See trl.SFTTrainer.

    formatting_func: row -> text; or, as older scripts have it, a batch of rows (a dict of lists) -> list of texts.
    """

    config_class = SFTConfig
    _passes: PassGraph | None = None
    _first_step: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(self.model, "max_seq_length"):
            use_fused_head(self.model)
            self._drop_padding()

    def _drop_padding(self) -> None:
        """Rows one after another instead of padded ones: no token is computed that nobody asked for.

        TRL has this too, but refuses it with `max_length`, to which the rows are cut here all the same.
        """
        collator = self.data_collator
        if type(collator) is not DataCollatorForLanguageModeling or fused.shared_of(self.model) is None:
            return
        logits_are_read = self.compute_metrics is not None or self.compute_loss_func is not None
        if collator.padding_free or not (self.args.packing or logits_are_read):
            settings = {f.name: getattr(collator, f.name) for f in dataclasses.fields(collator) if f.init}
            longest = self.args.max_length or self.model.max_seq_length
            whole = self.args.per_device_train_batch_size * longest if torch.cuda.is_available() else 0
            self.data_collator = PaddingFree(**{**settings, "padding_free": True, "whole": whole})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._passes = self._first_step = None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._let_graph_go()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._let_graph_go()  # its memory is evaluation's now
        return super().evaluate(*args, **kwargs)

    def _let_graph_go(self) -> None:
        if self._passes is not None:
            self._passes.drop()

    def training_step(self, model: Any, inputs: Arguments, num_items_in_batch: Any = None) -> Any:
        """TRL's; as one CUDA graph where batches keep their form."""
        inputs = self._prepare_inputs(inputs)
        if not self._is_plain(inputs):
            return super().training_step(model, inputs, num_items_in_batch)
        seen = self._total_train_tokens + _tokens(inputs)
        inputs.pop("fill", None)
        if self._may_record(model, inputs, num_items_in_batch):
            assert self._passes is not None
            found = self._passes({**inputs, "num_items_in_batch": num_items_in_batch})
        else:
            found = self._pass(model, inputs, num_items_in_batch)
        self._total_train_tokens = seen
        metrics = self._metrics["train"]
        metrics["num_tokens"] = [seen]
        loss = found.pop("loss")
        for name, value in found.items():
            metrics[name].append(value)
        return loss

    def _pass(self, model: Any, inputs: Arguments, num_items_in_batch: Any) -> dict[str, torch.Tensor]:
        """The loss of TRL's training step, and what was measured on the way: nothing else of a pass is kept."""
        shared = fused.shared_of(self.model)
        if shared is not None:
            shared.in_place = True
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            if shared is not None:
                shared.in_place = False
        return {"loss": loss} | {name: self._metrics["train"][name].pop() for name in MEASURED}

    def _may_record(self, model: Any, inputs: Arguments, items: Any) -> bool:
        """Whether this pass may run as a graph. Not in the first step: the optimizer has yet to take its memory."""
        if not (isinstance(items, torch.Tensor) and items.is_cuda and "label_rows" in inputs):
            return False
        if self._first_step is None:
            self._first_step = self.state.global_step
        if self._first_step == self.state.global_step:
            return False
        if self._passes is None:

            def step(batch: Arguments) -> dict[str, torch.Tensor]:
                batch = dict(batch)
                return self._pass(model, batch, batch.pop("num_items_in_batch"))

            reason = "fp16 scales the loss" if self.args.fp16 else obstacle(self.model)
            if reason is not None:
                log.info("passes run one kernel at a time: %s", reason)
            self._passes = PassGraph(self.model, step, allowed=reason is None)
        return self._passes.allowed

    def compute_loss(
        self, model: Any, inputs: Arguments, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. Its metrics stay on the device until they are logged: TRL waits for them after every batch."""
        if return_outputs or not self._is_plain(inputs):
            inputs = {name: x for name, x in inputs.items() if name not in ("label_rows", "fill")}  # whet's alone
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: x for name, x in inputs.items() if name != "fill"}
        outputs = model(**{**given, "use_cache": False}, fused_lm_head=True)
        labelled = outputs.label_mask.sum()
        items = labelled if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += _tokens(inputs)
        for name, values in zip(MEASURED, (outputs.entropy, outputs.is_top1), strict=True):
            self._metrics[mode][name].append(values.detach().sum() / labelled.clamp(min=1))
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return -outputs.log_probs.sum() / items.clamp(min=1)

    def _is_plain(self, inputs: Arguments) -> bool:
        """Whether the loss is the mean negative log-likelihood of a padding-free batch on one device."""
        return (
            "attention_mask" not in inputs
            and "position_ids" in inputs
            and self.args.loss_type == "nll"
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not self.aux_loss_enabled
            and self.accelerator.num_processes == 1
        )

    def log(self, logs: Arguments, *args: Any, **kwargs: Any) -> None:
        for values in self._metrics["train" if self.model.training else "eval"].values():
            values[:] = [float(value) for value in values]
        super().log(logs, *args, **kwargs)

    def _adjust(self, config: Any, arguments: Arguments) -> None:
        if arguments.get("formatting_func") is not None:
            config.dataset_text_field = "text"
            if config.completion_only_loss is None:
                config.completion_only_loss = False  # TRL would refuse a formatted data set with a "prompt" column
        shared = fused.shared_of(arguments["model"]) if hasattr(arguments.get("model"), "max_seq_length") else None
        if shared is None:
            return
        if shared.auto:
            model = arguments["model"]
            length = config.max_length or model.max_seq_length
            steady = config.packing or nearly_whole(arguments.get("train_dataset"), length)
            fit_to_memory(model, config, shared.budget, recorded=steady and not config.fp16 and obstacle(model) is None)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: FormattingFunction | None,
        dataset_name: str,
    ) -> Any:
        if formatting_func is not None and "input_ids" not in next(iter(dataset)):
            dataset = formatted(dataset, formatting_func, num_proc=args.dataset_num_proc)
            formatting_func = None
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


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
