"""whet: fine-tune language models on hardware you own.

The order of the journey: load a model (`FastLanguageModel`), give it data (`standardize_data_formats`,
`get_chat_template`), train it (`SFTTrainer` and its siblings), save it (`model.save_pretrained_merged`,
`model.save_pretrained_gguf`); or write all of that as one recipe for `whet run recipe.yaml`.

Names are imported when they are first used, so that `import whet` costs nothing and changes nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "FastLanguageModel": "whet.language_model",
    "FastModel": "whet.language_model",
    "WhetError": "whet.errors",
    "get_chat_template": "whet.data.chat_templates",
    "standardize_data_formats": "whet.data.chat_templates",
    "standardize_sharegpt": "whet.data.chat_templates",
    "to_sharegpt": "whet.data.chat_templates",
    "train_on_responses_only": "whet.train.responses",
    "is_bf16_supported": "whet.models.load",
    "TrainingArguments": "whet.train.arguments",
    **{
        f"{method}{kind}": "whet.train.trainers"
        for method in ("SFT", "DPO", "KTO", "ORPO", "GRPO", "Reward")
        for kind in ("Trainer", "Config")
    },
}

_RENAMED = {"standardize_sharegpt": "standardize_data_formats", "FastModel": "FastLanguageModel"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
