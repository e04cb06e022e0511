"""The helpers that fine-tuning notebooks of this field call by name: a chat template for a tokenizer, and data sets of
older shapes turned into role/content conversations."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, Value  # type: ignore[import-untyped]
from datasets import List as ListOf
from transformers import PreTrainedTokenizerBase

from whet.data.chat_formats import CHAT_FORMATS, ChatFormat, find_format, jinja
from whet.data.examples import Conversation
from whet.data.formats import FORMATS, detect, normalise
from whet.data.read.rows import Row
from whet.errors import WhetError

STANDARD_MAPPING = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str = "chatml",
    mapping: Mapping[str, str] = STANDARD_MAPPING,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> PreTrainedTokenizerBase:
    """Gives the tokenizer a named chat template, changing it in place, and returns it.

    chat_template: a name in `chat_formats.CHAT_FORMATS`, in any punctuation.
    mapping: the keys and role names that messages carry, as {"role": "from", "content": "value", "user": "human",
        "assistant": "gpt"} for ShareGPT.
    map_eos_token: the token that ends a turn becomes the tokenizer's end-of-sequence token. The vocabulary never grows.
    system_message: used where a conversation has none; None: the format's own, if it has one.
    Raises WhetError for an unknown name or mapping, or when the vocabulary lacks a token that the template rests on.
    """
    chat_format = find_format(chat_template)
    unknown = sorted(set(mapping) - set(STANDARD_MAPPING))
    if unknown:
        raise WhetError(
            f"mapping has the unknown key {unknown[0]!r}", where="mapping", fix=f"use {', '.join(STANDARD_MAPPING)}"
        )
    _check_special_tokens(tokenizer, chat_format, map_eos_token)
    tokenizer.chat_template = jinja(chat_format, mapping={**STANDARD_MAPPING, **mapping}, system_message=system_message)
    if map_eos_token and chat_format.end_token is not None:
        tokenizer.eos_token = chat_format.end_token
    return tokenizer


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat, map_eos_token: bool) -> None:
    if chat_format.bos and tokenizer.bos_token is None:
        raise WhetError(
            f"the template {chat_format.name} begins with a beginning-of-sequence token; this tokenizer has none",
            where="chat_template",
            fix=f"use a template that needs none: {_usable(tokenizer)}",
        )
    if chat_format.end_token is None and tokenizer.eos_token is None:
        raise WhetError(
            f"the template {chat_format.name} ends a turn with the end-of-sequence token; this tokenizer has none",
            where="chat_template",
            fix="set tokenizer.eos_token to a token of its vocabulary",
        )
    if map_eos_token and not _ends_with_known_token(tokenizer, chat_format):
        raise WhetError(
            f"the template {chat_format.name} ends a turn with {chat_format.end_token}, which is not in the vocabulary",
            where="chat_template",
            fix=f"use one of {_usable(tokenizer)}; or add the token and resize the embeddings before training; "
            "or pass map_eos_token=False to spell the token in pieces",
        )


def _ends_with_known_token(tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat) -> bool:
    return chat_format.end_token is None or chat_format.end_token in tokenizer.get_vocab()


def _usable(tokenizer: PreTrainedTokenizerBase) -> str:
    """The names of the templates whose special tokens the tokenizer has."""
    return ", ".join(
        chat_format.name
        for chat_format in CHAT_FORMATS
        if _ends_with_known_token(tokenizer, chat_format) and not (chat_format.bos and tokenizer.bos_token is None)
    )


# ---------------------------------------------------------------- data sets


def standardize_data_formats(dataset: Any) -> Any:
    """A data set whose "conversations" column holds role/content messages, made from one in any conversational format:
    messages, sharegpt (from/value), alpaca or prompt-completion. Other columns are kept.

    dataset: a datasets.Dataset or IterableDataset. Raises WhetError, naming the row, for rows of no such format.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise WhetError("the data set has no rows", where="dataset")
    format = detect(first, where="dataset row 0")
    if format not in ("messages", "sharegpt", "alpaca", "prompt-completion"):
        raise WhetError(f"rows of the format {format} are no conversations", where="dataset", fix="use it as it is")

    def standardize(values: dict[str, Any], index: int) -> dict[str, Any]:
        example = normalise(Row(values, "dataset row", index), format)
        assert isinstance(example, Conversation)
        return {"conversations": example.messages}

    consumed = [name for name in first if name in FORMATS[format].parts and name != "tools"]
    features = _standard_features(dataset.features, consumed)
    return dataset.map(standardize, with_indices=True, remove_columns=consumed, features=features)


def _standard_features(features: Any, consumed: list[str]) -> Any:
    """The columns of a standardized data set; None where messages do not say which keys they carry.

    Left to infer them, datasets looks at the first thousand rows, and fails at a tool call that comes later.
    """
    names = [name for name in ("messages", "conversations") if name in consumed]
    turns = features[names[0]] if features and names else None
    if not isinstance(turns, ListOf) or not isinstance(turns.feature, dict):
        return None
    further = {key: kind for key, kind in turns.feature.items() if key not in ("role", "content", "from", "value")}
    message = {"role": Value("string"), "content": Value("string"), **further}
    kept = {name: kind for name, kind in features.items() if name not in consumed}
    return Features({**kept, "conversations": ListOf(message)})


def to_sharegpt(
    dataset: Any,
    merged_prompt: str,
    output_column_name: str,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """A data set with one "conversations" column in from/value form, made of columns merged into one prompt.

    merged_prompt: text with {column} for a column's value; a part in [[double brackets]] is left out of a row when a
        column in it is empty.
    output_column_name: the column that holds the answer.
    conversation_extension: so many single exchanges, the row's own and others drawn at random, make a conversation.
    Raises WhetError for a column that the data set lacks.
    """
    if conversation_extension < 1:
        raise WhetError("conversation_extension is below 1", where="conversation_extension", fix="use 1 or more")
    for name in [*_placeholders(merged_prompt), output_column_name]:
        if name not in dataset.column_names:
            raise WhetError(
                f"the data set has no column {name!r}",
                where="merged_prompt" if name != output_column_name else "output_column_name",
                fix=f"use one of {', '.join(dataset.column_names)}",
            )
    exchanges = [
        [
            {"from": "human", "value": merge_columns(merged_prompt, row)},
            {"from": "gpt", "value": str(row[output_column_name])},
        ]
        for row in dataset
    ]
    orders = [range(len(exchanges)), *_shuffles(len(exchanges), conversation_extension - 1, random_state)]
    conversations = [[turn for i in chosen for turn in exchanges[i]] for chosen in zip(*orders, strict=True)]
    return Dataset.from_dict({"conversations": conversations})


OPTIONAL_PART = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def merge_columns(merged_prompt: str, row: Mapping[str, Any]) -> str:
    """The prompt with the row's values in it. Values are put in once: braces inside them mean nothing."""

    def fill(part: str) -> str:
        return PLACEHOLDER.sub(lambda match: _shown(row[match[1]]), part)

    pieces = OPTIONAL_PART.split(merged_prompt)  # text, optional, text, optional, ..., text
    kept = (
        piece for i, piece in enumerate(pieces) if i % 2 == 0 or all(_shown(row[name]) for name in _placeholders(piece))
    )
    return "".join(fill(piece) for piece in kept)


def _placeholders(text: str) -> list[str]:
    return PLACEHOLDER.findall(text)


def _shown(value: Any) -> str:
    return "" if value is None else str(value)


def _shuffles(rows: int, count: int, seed: int) -> Iterator[list[int]]:
    generator = random.Random(seed)
    for _ in range(count):
        yield generator.sample(range(rows), rows)
