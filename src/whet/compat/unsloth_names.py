"""The module that scripts written for `unsloth` import, made of whet's own functions and classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from whet.data.chat_templates import get_chat_template, standardize_data_formats, to_sharegpt
from whet.errors import WhetError
from whet.language_model import FastLanguageModel
from whet.models.load import is_bf16_supported
from whet.train.responses import train_on_responses_only
from whet.train.trainers import SFTConfig, SFTTrainer

log = logging.getLogger("whet")


class UnslothTrainingArguments(SFTConfig):
    """SFTConfig under the name that scripts for continued pretraining use."""

    def __init__(self, *args: Any, embedding_learning_rate: float | None = None, **kwargs: Any) -> None:
        if embedding_learning_rate is not None:
            raise WhetError(
                "a learning rate of its own for the embeddings is not supported",
                where="embedding_learning_rate",
                fix="leave it out, and embed_tokens and lm_head out of target_modules",
            )
        super().__init__(*args, **kwargs)


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """trainer.train(): its gradient accumulation is exact as it is."""
    return trainer.train(*args, **kwargs)


def nothing_to_patch(*args: Any, **kwargs: Any) -> None:
    """Takes the place of functions that rewrite TRL's trainers."""
    log.warning("TRL's trainers run on a whet model as they are: nothing to patch")


CHAT_TEMPLATES: dict[str, Any] = {
    "get_chat_template": get_chat_template,
    "standardize_data_formats": standardize_data_formats,
    "standardize_sharegpt": standardize_data_formats,
    "to_sharegpt": to_sharegpt,
    "train_on_responses_only": train_on_responses_only,
}
UNSLOTH: dict[str, Any] = {
    "FastLanguageModel": FastLanguageModel,
    "FastModel": FastLanguageModel,
    "PatchDPOTrainer": nothing_to_patch,
    "PatchFastRL": nothing_to_patch,
    "UnslothTrainer": SFTTrainer,
    "UnslothTrainingArguments": UnslothTrainingArguments,
    "is_bf16_supported": is_bf16_supported,
    "is_bfloat16_supported": is_bf16_supported,
    "unsloth_train": unsloth_train,
    **CHAT_TEMPLATES,
}


class StandIn(ModuleType):
    """A package made of `names`. Asking it for another one is an ImportError that lists what there is."""

    def __init__(self, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(name, f"whet under the name {name}")
        vars(self).update(names, __path__=[], __all__=sorted(names))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        raise ImportError(f"whet has no {name!r} for {self.__name__!r}; it has {', '.join(self.__all__)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


def unsloth_modules() -> dict[str, ModuleType]:
    """`unsloth` and `unsloth.chat_templates`, by name."""
    chat_templates = StandIn("unsloth.chat_templates", CHAT_TEMPLATES)
    return {
        "unsloth": StandIn("unsloth", {**UNSLOTH, "chat_templates": chat_templates}),
        "unsloth.chat_templates": chat_templates,
    }
