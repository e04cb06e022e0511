"""`FastLanguageModel`: load, adapt, and save a language model with the calls that users of this field know.

    model, tokenizer = FastLanguageModel.from_pretrained("builtin:tiny", max_seq_length=2048)
    model = FastLanguageModel.get_peft_model(model, r=16)
    ...                                                     # train with any trainer
    model.save_pretrained_merged("merged", tokenizer)

The saving methods are put on the one model that was loaded; no class is changed.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from whet.errors import WhetError
from whet.export.gguf_model import save_gguf
from whet.export.merge import save_merged
from whet.models import activations, fused
from whet.models.compute import check_adapter, check_compute, use_fp8
from whet.models.embedding import movable_embedding, move_to_host
from whet.models.load import load
from whet.models.lora import add_lora
from whet.units import parse_memory

LEAST_TILE = 1024  # tokens
LEAST_MEMORY = replace(activations.MOST, offload=True)
POLICIES = {"whet": LEAST_MEMORY, "unsloth": LEAST_MEMORY, True: activations.MOST, False: activations.ALL}
CHECKPOINTING = ("auto", *POLICIES)
NOT_YET = {
    "load_in_fp8": "8-bit floating-point weights",
    "fast_inference": "generation through vLLM",
    "qat_scheme": "quantization-aware training",
}


class FastLanguageModel:
    """A causal language model, its base frozen in few bits, and its LoRA adapter."""

    @staticmethod
    def from_pretrained(
        model_name: str = "builtin:tiny",
        max_seq_length: int = 2048,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = True,
        load_in_8bit: bool = False,
        load_in_16bit: bool = False,
        full_finetuning: bool = False,
        use_gradient_checkpointing: bool | str = "auto",
        random_state: int = 3407,
        num_labels: int | None = None,
        gpu_memory: str | float | None = None,
        compute: str = "bf16",
        offload_embedding: bool = False,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load a local folder, a hub name or `builtin:tiny`, and its tokenizer.

        max_seq_length: tokens; the longest row that training will see. Stored as `model.max_seq_length`.
        dtype: what to compute in; None takes bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU.
        load_in_4bit, load_in_8bit, load_in_16bit: how the frozen base is held; all False holds it in `dtype`.
        full_finetuning: train every weight, held in `dtype`; turns the three above off.
        use_gradient_checkpointing: what layers keep for the backward pass. "auto" is the fastest that fits; "whet" (or
        "unsloth") the least, in host memory; True all but the widest values; False everything.
        gpu_memory: "24GiB", or a number of GiB: what "auto" may take on the GPU; None is all that is free.
        num_labels: load a sequence classifier with this many outputs (1 for a reward model).
        compute: "bf16" multiplies by the base in `dtype`; "fp8" in 8-bit floating point, for an NF4 base on a GPU of
        NVIDIA's Hopper generation or later; the adapter stays in `dtype`.
        offload_embedding: hold the input embedding in host memory, where the GPU reads a row for each token. A plan
        ("auto") does so by itself where that pays.
        kwargs: attn_implementation, device_map, revision, token, trust_remote_code, and transformers' own.
        Raises WhetError, a ValueError, for anything at fault in the model's files or in these arguments.
        """
        _refuse_unsupported(kwargs)
        _check_checkpointing(use_gradient_checkpointing)
        if not isinstance(max_seq_length, int) or max_seq_length < 1:
            raise WhetError(
                f"must be a positive number of tokens, not {max_seq_length!r}", where="max_seq_length", fix="2048"
            )
        budget = None if gpu_memory is None else _bytes(gpu_memory)
        if load_in_8bit and load_in_16bit:
            raise WhetError(
                "the base can be held in one precision only", where="load_in_8bit, load_in_16bit", fix="set one"
            )
        precision = "16bit"
        if not (full_finetuning or load_in_16bit):
            precision = "int8" if load_in_8bit else "nf4" if load_in_4bit else "16bit"
        check_compute(compute, precision, dtype, full=full_finetuning)
        if num_labels is not None:
            kwargs |= {"auto_model": AutoModelForSequenceClassification, "num_labels": num_labels}
        auto_model = kwargs.pop("auto_model", None) or AutoModelForCausalLM
        torch.manual_seed(random_state)
        model, tokenizer = load(model_name, precision=precision, dtype=dtype, auto_model=auto_model, **kwargs)
        tokenizer.model_max_length = max_seq_length
        model.max_seq_length = max_seq_length
        model.config.use_cache = False
        _set_checkpointing(model, use_gradient_checkpointing)
        shared = fused.shared_of(model)
        if shared is not None:
            shared.budget = budget
        if compute == "fp8":
            use_fp8(model)
        if offload_embedding:
            _offload_embedding(model, full=full_finetuning)
        _attach(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        r: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        use_gradient_checkpointing: bool | str = "auto",
        random_state: int = 3407,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        loftq_config: dict[str, Any] | None = None,
        modules_to_save: Sequence[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        task_type: str = "CAUSAL_LM",
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **options: Any,
    ) -> PeftModel:
        """Freeze the base and put a LoRA adapter of rank `r` on `target_modules` (names, or "all-linear").

        The adapter is held in fp32 and starts as zero change; A is drawn with `random_state`.
        `options` are further fields of `peft.LoraConfig`. Raises WhetError for a rank, layer or switch at fault, and
        for an adapter that can't be had with `compute="fp8"`.
        """
        if (
            not (finetune_language_layers and finetune_attention_modules and finetune_mlp_modules)
            or finetune_vision_layers
        ):
            raise WhetError(
                "layers are chosen by name in a language model",
                where="finetune_*",
                fix='target_modules=["q_proj", ...]',
            )
        _check_checkpointing(use_gradient_checkpointing)
        if loftq_config:
            options |= {"loftq_config": loftq_config, "init_lora_weights": "loftq"}
        peft_model = add_lora(
            model,
            r=r,
            target_modules=target_modules,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            bias=bias,
            random_state=random_state,
            task_type=task_type,
            use_rslora=use_rslora,
            modules_to_save=list(modules_to_save) if modules_to_save else None,
            layers_to_transform=layers_to_transform,
            **options,
        )
        check_adapter(peft_model)
        peft_model.max_seq_length = max_seq_length or model.max_seq_length
        _set_checkpointing(peft_model, use_gradient_checkpointing)
        _attach(peft_model)
        return peft_model

    @staticmethod
    def for_inference(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        """Evaluation mode with the key-value cache on; returns the same model."""
        model.eval()
        _set_checkpointing(model, False)
        model.config.use_cache = True
        return model

    @staticmethod
    def for_training(
        model: PreTrainedModel | PeftModel, use_gradient_checkpointing: bool | str = "auto"
    ) -> PreTrainedModel | PeftModel:
        """Training mode with the key-value cache off; returns the same model."""
        _check_checkpointing(use_gradient_checkpointing)
        model.train()
        model.config.use_cache = False
        _set_checkpointing(model, use_gradient_checkpointing)
        return model


def save_pretrained_merged(
    self: PreTrainedModel | PeftModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    save_method: str = "merged_16bit",
    base: str = "dequantized",
    **kwargs: Any,
) -> None:
    """Write the model with its adapter merged in ("merged_16bit", "merged_4bit"), or the adapter alone ("lora").

    base: what the adapter is added to when the base is held in 4 or 8 bits. "dequantized" is what training saw;
    "original" reads the 16-bit weights from the model's source again.
    """
    save_merged(self, Path(save_directory), tokenizer, method=save_method, base=base, **kwargs)


def save_pretrained_gguf(
    self: PreTrainedModel | PeftModel,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    quantization_method: str | Sequence[str] = "q8_0",
    base: str = "dequantized",
) -> list[Path]:
    """Write one GGUF file for each of `quantization_method` (q4_k_m, q8_0, ...: quant/gguf_mixes.py); their paths."""
    methods = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    return save_gguf(self, Path(save_directory), tokenizer, methods, base=base)


def _attach(model: PreTrainedModel | PeftModel) -> None:
    """Put the saving methods on this one model."""
    for method in (save_pretrained_merged, save_pretrained_gguf):
        setattr(model, method.__name__, types.MethodType(method, model))


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    for name, meaning in NOT_YET.items():
        if kwargs.pop(name, None):
            raise WhetError(f"{meaning} is not supported yet", where=name, fix=f"leave {name} out")
    for name in ("max_lora_rank", "gpu_memory_utilization"):
        kwargs.pop(name, None)  # settings of fast_inference, without effect when it is off


def _offload_embedding(model: PreTrainedModel, *, full: bool) -> None:
    embedding = model.get_input_embeddings()
    if not full and embedding.weight.is_cuda:
        embedding.weight.requires_grad_(False)
        movable = movable_embedding(model)
        if movable is not None:
            move_to_host(movable)
            return
    if full or embedding.weight.is_cuda:  # without a GPU it lies in host memory
        why = "every weight is to be trained" if full else "the output head multiplies by the same weight"
        raise WhetError(f"the embedding can't leave the GPU: {why}", where="offload_embedding", fix="leave it out")


def _bytes(gpu_memory: str | float) -> float:
    try:
        return parse_memory(gpu_memory)
    except ValueError as error:
        raise WhetError(str(error), where="gpu_memory", fix='"24GiB", or 24') from None


def _check_checkpointing(value: bool | str) -> None:
    if value not in CHECKPOINTING:
        choices = ", ".join(repr(c) for c in CHECKPOINTING)
        raise WhetError(f"unknown value {value!r}", where="use_gradient_checkpointing", fix=f"use one of {choices}")


def _set_checkpointing(model: PreTrainedModel | PeftModel, value: bool | str) -> None:
    """Say what layers keep for the backward pass.

    "auto" lets whet's trainers plan it; until one does, and in other trainers, layers keep everything on a CPU and all
    but gate and up on a GPU.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    shared = fused.shared_of(base)
    if shared is not None:
        usual = activations.MOST if torch.cuda.is_available() else activations.ALL
        shared.policy, shared.layers, shared.auto = POLICIES.get(value, usual), None, value == "auto"
        shared.tile = LEAST_TILE if POLICIES.get(value) is LEAST_MEMORY else fused.TILE
    # Layers that run as transformers wrote them run again as a whole, or keep everything.
    recompute = torch.cuda.is_available() if value == "auto" else bool(value)
    # transformers 5.24 renamed both methods
    if recompute:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        base.disable_input_require_grads()  # PEFT's; transformers forgets those before its own
        enable({"use_reentrant": False})
        # It also has the embedding's output ask for a gradient, which reentrant checkpoints need and nobody reads: a
        # product with the first layer's q, k and v for each token.
        base.disable_input_require_grads()
    elif _recomputes(base):
        disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
        disable()


def _recomputes(base: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
