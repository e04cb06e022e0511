"""The models of a recipe: the base it names, the base with a fresh adapter, and what a run has trained."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from whet.data.chat_templates import get_chat_template
from whet.language_model import FastLanguageModel
from whet.models.load import load_config, load_tokenizer
from whet.recipe import Model, Recipe


def config_of(model: Model) -> PretrainedConfig:
    return load_config(model.base)


def tokenizer_of(model: Model) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the chat template that the recipe names."""
    return _with_template(load_tokenizer(model.base), model)


def load_base(
    model: Model, name: str | None = None, gpu_memory: str | None = None, compute: str = "bf16"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, or the folder `name` in its place, held as the recipe says.

    Only training asks for the recipe's `compute`: evaluation shows what is exported, which computes in 16 bits.
    """
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        name or model.base,
        max_seq_length=model.max_seq_length,
        dtype="float32" if model.load == "32bit" else model.dtype,
        load_in_4bit=model.load == "nf4",
        load_in_8bit=model.load == "int8",
        gpu_memory=gpu_memory,
        compute=compute,
    )
    return loaded, _with_template(tokenizer, model)


def load_for_training(recipe: Recipe) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The base with a fresh adapter, or with every weight to be trained where the recipe has no adapter."""
    model, tokenizer = load_base(recipe.model, gpu_memory=recipe.budget.gpu_memory, compute=recipe.model.compute)
    if adapter := recipe.adapter:
        model = FastLanguageModel.get_peft_model(
            model,
            r=adapter.r,
            lora_alpha=adapter.alpha,
            target_modules=adapter.targets,
            lora_dropout=adapter.dropout,
            use_rslora=adapter.rslora,
            use_dora=adapter.dora,
            random_state=recipe.seed,
        )
    return model, tokenizer


def load_tuned(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """What was trained and saved in `folder`: the base with that adapter, or that whole model."""
    if recipe.adapter is None:
        return load_base(recipe.model, str(folder))
    model, tokenizer = load_base(recipe.model)
    return PeftModel.from_pretrained(model, str(folder)), tokenizer


def _with_template(tokenizer: PreTrainedTokenizerBase, model: Model) -> PreTrainedTokenizerBase:
    return get_chat_template(tokenizer, model.template) if model.template else tokenizer
