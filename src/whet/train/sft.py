"""Learning to continue text, or to answer: TRL's trainer on batches without padding, its passes as CUDA graphs."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
import trl
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from whet.kernels import flash4
from whet.models import fused
from whet.models.head import use_fused_head
from whet.plan.fit import fit_to_memory
from whet.train.arguments import OlderArguments
from whet.train.collator import PaddingFree, nearly_whole
from whet.train.formatting import FormattingFunction, formatted
from whet.train.layerwise import Layerwise, allowed
from whet.train.older import Arguments, OlderTrainer
from whet.train.optimizer import AdamW8bit
from whet.train.pass_graph import PassGraph, obstacle

log = logging.getLogger("whet")

MEASURED = ("entropy", "mean_token_accuracy")  # in each pass, beside its loss


class SFTConfig(OlderArguments, trl.SFTConfig):
    """trl.SFTConfig that also takes older names, such as max_seq_length."""


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
    _layerwise: Layerwise | None = None

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
        with fused.weights_held(self.model):
            try:
                return super().train(*args, **kwargs)
            finally:
                self._let_graph_go()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Its steps go layer by layer where that changes nothing but memory."""
        made = super().create_optimizer(*args, **kwargs)
        one = self.args.gradient_accumulation_steps == 1 and self.accelerator.num_processes == 1
        layers = fused.trained_layers(self.model) if one and allowed(self.args) else []
        if layers and isinstance(made, AdamW8bit):
            self._layerwise = Layerwise(layers, made)
            log.info("weights are updated layer by layer, within the backward pass")
        return made

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._layerwise is not None and grad_norm is None:
            return self._layerwise.norm(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

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
            shared.in_place, shared.begins = True, self._layerwise
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            if shared is not None:
                shared.in_place, shared.begins = False, None
        return {"loss": loss} | {name: self._metrics["train"][name].pop() for name in MEASURED}

    def _may_record(self, model: Any, inputs: Arguments, items: Any) -> bool:
        """Whether this pass may run as a graph. Not in the first step: the optimizer has yet to take its memory."""
        if not (isinstance(items, torch.Tensor) and items.is_cuda and "label_rows" in inputs):
            return False
        if self._layerwise is not None:  # a step's own numbers go to each of its updates
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

    def _track_num_input_tokens(self, inputs: Arguments) -> None:
        """transformers' count of tokens seen; of a padding-free batch by its shape: counting waits for the device."""
        if self.args.include_num_input_tokens_seen == "no" or not self._is_plain(inputs):
            super()._track_num_input_tokens(inputs)
        else:
            self.state.num_input_tokens_seen += _tokens(inputs)

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
        flash4.prepare()
        if shared.auto:
            model = arguments["model"]
            length = config.max_length or model.max_seq_length
            steady = config.packing or nearly_whole(arguments.get("train_dataset"), length)
            recorded = steady and not config.fp16 and obstacle(model) is None
            layerwise = allowed(config) and bool(fused.trained_layers(model))
            fit_to_memory(model, config, shared.budget, recorded=recorded, layerwise=layerwise)

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
