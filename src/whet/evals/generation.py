"""Answers from a model in memory: batched, padded at the left, with a key-value cache.

Every setting comes from the caller. What a model's generation_config asks for (sampling, penalties) is left out, so
that a task says all that decides its answers; its end tokens alone are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from whet.errors import WhetError

NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_p": None}


@dataclass(frozen=True)
class Generation:
    """How answers are generated.

    temperature: 0 takes the likeliest token; above, tokens are drawn with `seed` from the likeliest that hold `top_p`.
    stop: texts at which an answer ends; they are no part of it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    how: Generation,
    *,
    batch: int = 16,
) -> list[str]:
    """The answer to each prompt (token ids), without special tokens, white space at the ends cut.

    Leaves evaluation mode and random state to the caller. Raises WhetError when the device has no memory for a batch.
    """
    if how.temperature > 0:
        torch.manual_seed(how.seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for i, text in zip(chosen, _batch(model, tokenizer, [prompts[i] for i in chosen], how), strict=True):
            answers[i] = _cut(text, how.stop).strip()
    return answers


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the model's and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    return sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})


def _batch(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Sequence[int]], how: Generation) -> list[str]:
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature > 0 else {}
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=how.temperature > 0,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
        **NEUTRAL,
        **sampling,
    )
    ids, mask = _padded_left(prompts, pad, model.device)
    width = ids.shape[1]
    stops = StoppingCriteriaList([_Stop(tokenizer, how.stop, width)]) if how.stop else None
    try:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stops)
    except torch.OutOfMemoryError as error:
        what = f"no memory for {len(prompts)} answers of {width} + {how.max_new_tokens} tokens at a time"
        raise WhetError(what, where=str(model.device), fix="evaluate with a smaller batch") from error
    texts: list[str] = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


def _padded_left(rows: Sequence[Sequence[int]], fill: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T]."""
    width = max(map(len, rows))
    ids = torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stops."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[: min(found)] if found else text


class _Stop(StoppingCriteria):
    """Ends a row once its answer holds one of the texts. transformers' own looks at the prompt too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.tail = max(len(s.encode()) for s in stop) + 4  # tokens, each of a byte or more; a character may be split

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        tails = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.tail :], skip_special_tokens=True)
        return torch.tensor([any(s in tail for s in self.stop) for tail in tails], device=input_ids.device)
