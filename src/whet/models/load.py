"""From a model's name or folder to a frozen model in memory and its tokenizer.

Weights come from safetensors only. The base is held as NF4 with double quantization (bitsandbytes' layout), as 8-bit
integers, or in 16 or 32 bits. Everything a user can get wrong about a folder is found before the first weight is read.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import PreTrainedModel

from whet.errors import WhetError
from whet.kernels._streams import on_default_stream
from whet.models import attention
from whet.models.fused import fuse
from whet.models.streaming import streamed

log = logging.getLogger("whet")

BUILTIN = Path(__file__).parent.parent / "builtin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NEW_HEADS = ("score.", "classifier.")  # of a classifier made from a language model: random until trained
PRECISIONS = ("nf4", "int8", "16bit", "32bit")


def resolve(name: str) -> str:
    """A name as the user wrote it -> a local folder, or the hub name unchanged. `builtin:NAME` lies in the package."""
    if name.startswith("builtin:"):
        folder = BUILTIN / name.removeprefix("builtin:")
        if not folder.is_dir():
            have = ", ".join(f"builtin:{p.name}" for p in sorted(BUILTIN.iterdir()) if p.is_dir())
            raise WhetError("there is no such built-in model", where=name, fix=f"use one of: {have}")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file():
        raise WhetError(
            "there is no model folder here", where=name, fix="give a folder that holds config.json and *.safetensors"
        )
    return name


def _check_folder(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        hint = (
            "this is a LoRA adapter: name its base model here"
            if (path / "adapter_config.json").is_file()
            else "give a folder with config.json and *.safetensors"
        )
        raise WhetError("the model folder has no config.json", where=str(path), fix=hint)
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WhetError(
            f"not valid JSON: {error}", where=str(config), fix="copy the file again from the model's source"
        ) from None
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise WhetError(
            f"the weights are a pickle ({pickles[0]}), which can run code when it is read; whet reads safetensors only",
            where=str(path),
            fix="convert it where you trust it: model.save_pretrained(folder) writes safetensors",
        )
    raise WhetError("the model folder has no *.safetensors", where=str(path), fix="copy the weights into this folder")


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype to compute in. None means bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU."""
    if isinstance(dtype, str):
        if dtype.removeprefix("torch.") not in DTYPES:
            raise WhetError(f"unknown dtype {dtype!r}", where="dtype", fix=f"use one of {', '.join(DTYPES)}, or None")
        dtype = DTYPES[dtype.removeprefix("torch.")]
    if not torch.cuda.is_available():
        if dtype == torch.float16:
            log.warning("float16 does not train on a CPU: computing in float32 instead")
        return torch.float32 if dtype in (None, torch.float16) else dtype
    bf16 = torch.cuda.is_bf16_supported()
    if dtype == torch.bfloat16 and not bf16:
        log.warning("this GPU has no bfloat16: computing in float16 instead")
    if dtype in (None, torch.bfloat16):
        return torch.bfloat16 if bf16 else torch.float16
    return dtype


def is_bf16_supported() -> bool:
    """Whether the GPU here computes in bf16. False without a GPU: nothing here calls for 16-bit training then."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def load(
    name: str,
    *,
    precision: str = "nf4",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    auto_model: Any = AutoModelForCausalLM,
    revision: str | None = None,
    token: str | None = None,
    num_labels: int | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load `name` (folder, hub name or builtin:tiny) with its base in `precision`, computing in `dtype`.

    precision: "nf4" (double-quantized, 64 weights a block), "int8", "16bit" (or what `dtype` says), "32bit".
    num_labels: outputs of the head, where `auto_model` is a classifier.
    Raises WhetError when the folder, its weights or its vocabulary are at fault.
    """
    if precision not in PRECISIONS:
        raise WhetError(f"unknown precision {precision!r}", where="load", fix=f"use one of {', '.join(PRECISIONS)}")
    folder = resolve(name)
    dtype = torch.float32 if precision == "32bit" else pick_dtype(dtype)
    origin = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    config = load_config(name, **origin)
    tokenizer = _tokenizer(name, config, **origin)
    if num_labels is not None:
        config.num_labels = num_labels
    with on_default_stream(torch.device("cuda", i) for i in range(torch.cuda.device_count())):
        model, loaded = _from_hub(
            name,
            streamed(auto_model).from_pretrained,
            folder,
            config=config,
            dtype=dtype,
            quantization_config=_quantization(config, precision, dtype),
            device_map=device_map if device_map is not None else {"": 0 if torch.cuda.is_available() else "cpu"},
            use_safetensors=True,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **origin,
            **model_kwargs,
        )
    _check_weights(name, loaded)
    _keep_nf4_layout(model)
    if attn_implementation is None and getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(attention.register())
        fuse(model)
    return model, tokenizer


def load_config(name: str, **origin: Any) -> PretrainedConfig:
    """config.json of `name`."""
    return _from_hub(name, AutoConfig.from_pretrained, resolve(name), **origin)


def load_tokenizer(name: str, **origin: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, checked against the model's vocabulary; pads with its end token if it has no other."""
    return _tokenizer(name, load_config(name, **origin), **origin)


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization, computing in `dtype`: the one 4-bit layout that whet reads and writes."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _tokenizer(name: str, config: PretrainedConfig, **origin: Any) -> PreTrainedTokenizerBase:
    tokenizer = _from_hub(name, AutoTokenizer.from_pretrained, resolve(name), **origin)
    _check_vocabulary(name, config, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _quantization(config: Any, precision: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if precision in ("16bit", "32bit"):
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None  # the checkpoint is quantized already and says how
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return nf4_config(dtype)


def _keep_nf4_layout(model: PreTrainedModel) -> None:
    """Hold bitsandbytes to one layout and one arithmetic on every CPU.

    On CPUs with AVX512-BF16 its first evaluation repacks each weight for a bf16 kernel that has no gradient: training
    after an evaluation would then get no gradient through the base, and exports would read the packed bytes as NF4.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _from_hub(name: str, load_one: Any, folder: str, **kwargs: Any) -> Any:
    try:
        return load_one(folder, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(folder).is_dir():
            raise WhetError(
                f"the model could not be read: {reason}",
                where=name,
                fix="check the folder's files against their source",
            ) from error
        raise WhetError(
            f"neither a local folder nor a model the hub would give: {reason}",
            where=name,
            fix="give a local folder, or `builtin:tiny`; with HF_HUB_OFFLINE set, only models in the cache are found",
        ) from error


def _check_weights(name: str, loaded: dict[str, Any]) -> None:
    """Refuse what transformers fills with random numbers: weights that the files lack or hold in another shape."""
    for key, in_file, in_model in sorted(loaded["mismatched_keys"]):
        raise WhetError(
            f"{key} is {tuple(in_file)} in the files but {tuple(in_model)} by config.json",
            where=name,
            fix="copy config.json and the weights again from one source",
        )
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith(NEW_HEADS))
    if missing:
        raise WhetError(
            f"the files lack {len(missing)} of the model's weights, {missing[0]} first",
            where=name,
            fix="copy all *.safetensors and config.json again from the model's source",
        )


def _check_vocabulary(name: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise WhetError(
            f"the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} rows",
            where=name,
            fix="use the tokenizer this model was trained with, or give it more rows with resize_token_embeddings",
        )
