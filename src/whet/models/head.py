"""The output head of a model in TRL's SFTTrainer: only rows that have a label are multiplied by the vocabulary.

TRL puts a forward on the model's instance that answers `fused_lm_head=True` with log-probabilities in the place of
logits. It multiplies by the vocabulary in the forward pass and again in the backward pass, on a CPU for every position.
`use_fused_head` puts `kernels.cross_entropy` in front of it, which does both at once, for the labelled rows alone.
A head that trains, tied to the embedding or not, costs two more products, in the backward pass.
Every other call, and every head that this file does not know, goes to the forward that was there.
"""

from __future__ import annotations

import functools
import logging
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from whet.kernels.cross_entropy import linear_log_probs, linear_log_probs_weight_grad
from whet.models.fused import shared_of
from whet.models.projection import takes_in_place

log = logging.getLogger("whet")

IGNORED = -100
BACKWARD_ROWS = 4096

# transformers' classes by what they do to the head's product; tests compare each with its own logits.
PLAIN = {
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
    "Starcoder2ForCausalLM",
}
SOFTCAPPED = {"Gemma2ForCausalLM", "Gemma3ForCausalLM"}  # tanh, by config.final_logit_softcapping
MULTIPLIED = {"CohereForCausalLM", "Cohere2ForCausalLM"}  # by config.logit_scale
DIVIDED = {"GraniteForCausalLM"}  # by config.logits_scaling


def use_fused_head(model: PreTrainedModel | PeftModel) -> None:
    """Put whet's head in front of the one that TRL's trainer put on the model. Changes this instance alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    there = vars(base).get("forward")
    if not isinstance(there, MethodType):
        return
    said: set[str] = set()

    @functools.wraps(type(base).forward)  # generation and the trainer read the signature
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, label_rows: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            # `there` is bound to the model it was made for; a copy of that model has weights of its own.
            return there(*args, **kwargs) if self is there.__self__ else type(self).forward(self, *args, **kwargs)
        reason = _reason_for_trl_s(self, kwargs)
        if reason is None:
            return _forward(self, *args, label_rows=label_rows, **kwargs)
        if reason not in said:
            said.add(reason)
            log.info("the loss is computed by TRL's head, not by whet's: %s", reason)
        return there.__func__(self, *args, fused_lm_head=True, **kwargs)

    base.forward = MethodType(forward, base)


def _reason_for_trl_s(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why TRL's head must do this call; None if ours can. Asked at each call: PEFT and FSDP replace heads in place."""
    name, head = type(model).__name__, _head(model)
    known = name in PLAIN | SOFTCAPPED | MULTIPLIED | DIVIDED and type(model).__module__.startswith("transformers.")
    if not known:
        return f"{name} may scale its logits in a way that whet does not know"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain linear layer"
    if isinstance(head.weight, DTensor) or hasattr(head.weight, "ds_id") or head.weight.ndim != 2:
        return "the head's weight is spread over devices"
    if head.weight.is_meta or hasattr(head, "_hf_hook"):
        return "the head's weight is offloaded"
    if kwargs.get("output_router_logits") or getattr(model.config, "output_router_logits", False):
        return "the loss has a part for the routing of experts"
    return None


def _head(model: Any) -> Any:
    """The module that makes the logits; of PEFT's copies for `modules_to_save` the active one."""
    head = model.get_output_embeddings()
    if type(head) is not ModulesToSaveWrapper:
        return head
    if head.disable_adapters or not head.active_adapters:
        return head.original_module
    return head.modules_to_save[head.active_adapters[0]]


def _scaling(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits."""
    name, config = type(model).__name__, model.config
    if name in MULTIPLIED:
        return float(config.logit_scale), None
    if name in DIVIDED:
        return 1.0 / config.logits_scaling, None
    return 1.0, config.final_logit_softcapping if name in SOFTCAPPED else None


def _forward(
    model: Any,
    *args: Any,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    label_rows: torch.Tensor | None = None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> FusedCausalLMOutput:
    """TRL's fused output: fields of [batch, length - 1], or [batch, length] with `shift_labels`, 0 where ignored.

    label_rows [2, N]: what of a batch's positions, counted through all rows, has a label, and which. Then fields are
    [N], and a GPU need not be waited for. Positions of label IGNORED may be among them.
    """
    kwargs["use_cache"] = False
    h_BSD = model.base_model(*args, **kwargs).last_hidden_state
    head = _head(model)
    device, length = head.weight.device, h_BSD.shape[1]
    if label_rows is not None:
        rows_N, labels_N = label_rows.to(device)
        mask = labels_N != IGNORED
        labels_N = labels_N.clamp(min=0)
    else:
        if shift_labels is None:
            assert labels is not None, "the trainer gives labels, shift_labels or label_rows"
            shift_labels = labels[:, 1:]
        shift_labels = shift_labels.to(device)
        mask = shift_labels != IGNORED
        batch, position = mask.nonzero(as_tuple=True)
        rows_N, labels_N = batch * length + position, shift_labels[batch, position]
    scale, softcap = _scaling(model)
    fields = LinearLogProbs.apply(  # type: ignore[no-untyped-call]
        h_BSD.to(device).flatten(0, 1),
        rows_N,
        head.weight,
        labels_N,
        head.bias,
        softcap,
        scale,
        torch.is_grad_enabled(),
        head.weight.requires_grad and (shared := shared_of(model)) is not None and shared.in_place,
    )
    if label_rows is not None:
        log_probs, entropy, is_top1 = (torch.where(mask, x, x.new_zeros(())) for x in fields)
    else:  # out of place, so that a batch without any label still has a gradient, of zeros
        log_probs, entropy, is_top1 = (x.new_zeros(mask.shape).index_put((batch, position), x) for x in fields)
    items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / items, log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask
    )


class LinearLogProbs(torch.autograd.Function):
    """`linear_log_probs` of the rows `rows_N` of `h_TD`, differentiable with respect to h_TD, weight and bias.

    (h_TD, rows_N int64, weight_VD, labels_N, bias, softcap, scale, need_grad, in_place) -> log_probs_N, and entropy_N
    and is_top1_N without gradient. Runs in autocast's dtype. Rows may repeat only where nothing reads their log_probs.
    need_grad: whether grad mode is on, which `forward` itself cannot see. in_place: add the weight's gradient to its
    `grad`. Kept for backward: the N rows of h's gradient; for that of weight and bias, those of h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: torch.Tensor,
        rows_N: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        scale: float,
        need_grad: bool,
        in_place: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h_ND = h_TD.index_select(0, rows_N)
        if torch.is_autocast_enabled(h_ND.device.type):
            h_ND = h_ND.to(torch.get_autocast_dtype(h_ND.device.type))
        of_h, _, of_weight, _, of_bias, *_ = (need_grad and needed for needed in ctx.needs_input_grad)
        trained = of_weight or of_bias
        result = linear_log_probs(
            h_ND,
            weight_VD,
            labels_N,
            bias=bias,
            softcap=softcap,
            scale=scale,
            need_grad=of_h,
            need_lse=trained,
            out=None if trained else h_ND,
        )
        ctx.mark_non_differentiable(result.entropy_N, result.is_top1_N)
        ctx.shape, ctx.dtype, ctx.softcap, ctx.scale = h_TD.shape, h_TD.dtype, softcap, scale
        head = (h_ND, weight_VD, bias, labels_N, result.lse_N) if trained else ()
        ctx.weight = weight_VD if in_place and of_weight and takes_in_place(weight_VD, h_ND.dtype) else None
        ctx.save_for_backward(rows_N, result.dh_ND, *head)
        return result.log_probs_N, result.entropy_N, result.is_top1_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        rows_N, dh_ND, *head = ctx.saved_tensors
        dh_TD = dweight_VD = dbias_V = None
        if head:  # first: its buffer is gone before the gradient of h is there
            h_ND, weight_VD, bias, labels_N, lse_N = head
            dweight_VD, dbias_V = linear_log_probs_weight_grad(
                h_ND,
                weight_VD,
                labels_N,
                lse_N,
                grad_N,
                bias=bias,
                softcap=ctx.softcap,
                scale=ctx.scale,
                need_weight=ctx.needs_input_grad[2],
                need_bias=ctx.needs_input_grad[4],
                add_to=None if ctx.weight is None else ctx.weight.grad,
            )
            if ctx.weight is not None:
                ctx.weight.grad, dweight_VD = dweight_VD, None
        if dh_ND is not None:
            dh_TD = dh_ND.new_zeros(ctx.shape, dtype=ctx.dtype)
            for i in range(0, len(rows_N), BACKWARD_ROWS):  # in parts, so that no third tensor of this size is made
                part = slice(i, i + BACKWARD_ROWS)
                scaled = dh_ND.new_empty(dh_ND[part].shape, dtype=ctx.dtype)
                torch.mul(dh_ND[part], grad_N[part, None], out=scaled)  # in the gradient's fp32, rounded once
                dh_TD.index_copy_(0, rows_N[part], scaled)
        return dh_TD, None, dweight_VD, None, dbias_V, None, None, None, None
