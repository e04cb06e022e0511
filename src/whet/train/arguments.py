"""Training arguments under the names that scripts were written with, on a machine that may have no GPU.

transformers 5 and TRL 1 dropped arguments that most scripts in circulation use. `OLDER_ARGUMENTS` says, name by name,
what each one is today; `OlderArguments` applies it in front of any of their argument classes. A precision that this
machine does not have is replaced, and said; nothing is dropped in silence.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers

from whet.errors import WhetError

log = logging.getLogger("whet")

Translation = Callable[[str, Any], dict[str, Any]]
"""(older name, its value) -> the arguments to pass today; none where nothing reads it any more."""


def _now(field: str) -> Translation:
    """The same value under another name."""
    return lambda name, value: {field: value}


def _when_on(**arguments: Any) -> Translation:
    """A switch that became a value of another argument; off, it was the default."""
    return lambda name, value: dict(arguments) if value else {}


def _ignored(reason: str) -> Translation:
    def ignore(name: str, value: Any) -> dict[str, Any]:
        log.warning("%s has no effect: %s", name, reason)
        return {}

    return ignore


def _refused(what: str, fix: str) -> Translation:
    def refuse(name: str, value: Any) -> dict[str, Any]:
        if value:
            raise WhetError(what, where=name, fix=fix)
        return {}

    return refuse


def _warmup_ratio(name: str, value: Any) -> dict[str, Any]:
    if not 0 <= value < 1:  # transformers would read 1 or more as a number of steps
        raise WhetError(f"must be at least 0 and less than 1, not {value!r}", where=name, fix="warmup_ratio=0.1")
    return {"warmup_steps": float(value)}


_ACCELERATOR = _ignored("the accelerator is found by itself; use_cpu=True keeps off it")
_FP16_BACKEND = _ignored("mixed precision is torch's own now")
_PROMPT = _ignored("prompts are no longer cut on their own; max_length bounds prompt and answer together")
_PACKED_ROWS = _ignored("rows are packed by their real length in tokens")
_ALWAYS = _ignored("this is how it always works now")
_ENCODER_DECODER = _ignored("this trainer takes decoder-only models")

OLDER_ARGUMENTS: dict[str, Translation] = {
    # transformers.TrainingArguments
    "evaluation_strategy": _now("eval_strategy"),
    "evaluate_during_training": _when_on(eval_strategy="steps"),
    "per_gpu_train_batch_size": _now("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": _now("per_device_eval_batch_size"),
    "warmup_ratio": _warmup_ratio,
    "no_cuda": _now("use_cpu"),
    "adafactor": _when_on(optim="adafactor"),
    "group_by_length": _when_on(train_sampling_strategy="group_by_length"),
    "include_inputs_for_metrics": _when_on(include_for_metrics=["inputs"]),
    "include_tokens_per_second": _when_on(include_num_input_tokens_seen="non_padding"),
    "push_to_hub_model_id": _now("hub_model_id"),
    "push_to_hub_token": _now("hub_token"),
    "overwrite_output_dir": _ignored(
        "checkpoints are added to output_dir, and resumed from only when train() is told to"
    ),
    "logging_dir": _ignored("TensorBoard reads the environment variable TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": _ignored("weights are always saved as safetensors"),
    "use_mps_device": _ACCELERATOR,
    "use_ipex": _ACCELERATOR,
    "jit_mode_eval": _ACCELERATOR,
    "fp16_backend": _FP16_BACKEND,
    "fp16_opt_level": _FP16_BACKEND,
    "half_precision_backend": _FP16_BACKEND,
    "dispatch_batches": _refused(
        "moved into the accelerator's configuration", 'accelerator_config={"dispatch_batches": True}'
    ),
    "split_batches": _refused(
        "moved into the accelerator's configuration", 'accelerator_config={"split_batches": True}'
    ),
    # TRL's configs, and arguments of its trainers from the time before there were configs
    "max_seq_length": _now("max_length"),
    "max_prompt_length": _PROMPT,
    "max_target_length": _ENCODER_DECODER,
    "is_encoder_decoder": _refused("whet trains decoder-only models", "leave is_encoder_decoder out"),
    "dataset_batch_size": _ignored("rows are tokenized one by one"),
    "num_of_sequences": _PACKED_ROWS,
    "chars_per_token": _PACKED_ROWS,
    "infinite": _refused("data is read once an epoch", "set num_train_epochs or max_steps"),
    "label_pad_token_id": _ignored("labels to leave out are -100"),
    "padding_value": _ignored("rows are padded with tokenizer.pad_token"),
    "use_num_logits_to_keep": _ALWAYS,
    "use_logits_to_keep": _ALWAYS,
    "force_use_ref_model": _ALWAYS,
    "reference_free": _refused(
        "every preference is measured against a reference model", "leave reference_free out, or use ORPOTrainer"
    ),
    "generate_during_eval": _refused(
        "answers are not sampled while evaluating",
        "generate after training, with FastLanguageModel.for_inference(model)",
    ),
}

TRL_MAY_DECIDE = ("remove_unused_columns", "train_sampling_strategy")
"""Fields whose default a TRL trainer needs otherwise than transformers has it: carried over only when they were set."""


class OlderArguments:
    """Put before transformers' or TRL's argument class, takes the names of `OLDER_ARGUMENTS` too.

    A name is read by the table only while the class itself has no such field. Unknown names raise TypeError.
    """

    _given: frozenset[str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        kwargs = translate(kwargs, set(defaults))
        # A copy of a whole object (dataclasses.replace, a command-line parser) names every field and so says nothing.
        self._given = _with_mirrors(kwargs) if len(kwargs) < len(defaults) else None
        if defaults["bf16"] is None:  # TRL's way of saying that the best precision is wanted
            kwargs.setdefault("bf16", None)
        super().__init__(*args, **available(kwargs))


class TrainingArguments(OlderArguments, transformers.TrainingArguments):
    """transformers.TrainingArguments that also takes the names dropped since, and a machine without a GPU."""


def translate(arguments: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """`arguments` under the names of today. names: the fields there are.

    Where the newer name is given as well, and says something, it wins.
    """
    current = {name: value for name, value in arguments.items() if name in names or name not in OLDER_ARGUMENTS}
    for name, value in arguments.items():
        if name in current:
            continue
        for field, translated in OLDER_ARGUMENTS[name](name, value).items():
            if field not in names:
                raise TypeError(f"unexpected keyword argument {name!r}")
            current[field] = current.get(field) or translated
    return current


def available(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with the precisions that this machine does not have replaced, and each replacement logged.

    Without a GPU, fp16 and bf16 become fp32, but for bf16 where use_cpu=True asks for the CPU; a GPU without bf16 gets
    fp16. bf16=None is the best of them: bf16 or fp16 on a GPU, fp32 on a CPU.
    """
    arguments = dict(arguments)
    use_cpu = bool(arguments.get("use_cpu"))
    gpu = torch.cuda.is_available() and not use_cpu
    gpu_bf16 = gpu and torch.cuda.is_bf16_supported()
    if "bf16" in arguments and arguments["bf16"] is None:
        fp16 = bool(arguments.get("fp16"))
        arguments |= {"bf16": gpu_bf16 and not fp16, "fp16": fp16 or (gpu and not gpu_bf16)}
    for brain, half in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if arguments.get(brain) and not (gpu_bf16 or use_cpu):
            log.warning("%s=True: this machine has no GPU with bf16; using %s", brain, "fp16" if gpu else "fp32")
            arguments |= {brain: False, half: gpu}
        if arguments.get(half) and not gpu:
            log.warning("%s=True: fp16 needs a GPU; using fp32 on the CPU", half)
            arguments[half] = False
    if arguments.get("tf32") and not (gpu and torch.cuda.get_device_capability() >= (8, 0)):
        log.warning("tf32=True: this machine has no GPU with tf32; using fp32")
        arguments["tf32"] = None
    return arguments


def given_names(args: transformers.TrainingArguments) -> frozenset[str]:
    """The fields that the user set. An object of a class other than ours shows them by values that are no defaults."""
    known = getattr(args, "_given", None)
    if known is not None:
        return frozenset(known)
    # Resolved, activation_checkpointing only repeats gradient_checkpointing, whose default says what was set.
    fields = [field for field in dataclasses.fields(args) if field.name != "activation_checkpointing"]
    return frozenset(f.name for f in fields if (getattr(args, f.name) or None) != (_default(f) or None))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _with_mirrors(names: Iterable[str]) -> frozenset[str]:
    """gradient_checkpointing got a second name in transformers 5.24; either one sets both."""
    given = frozenset(names)
    return given | {"gradient_checkpointing"} if "activation_checkpointing" in given else given
