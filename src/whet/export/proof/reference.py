"""What the tuned model itself says: the adapter on its base, asked once, for every artifact to be compared with.

For each prompt the greedy answer, and the distributions of the next token over the end of the prompt and the answer.
Shapes: T tokens of a prompt and its answer, P positions compared, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedTokenizerBase

from whet.errors import WhetError

Model: TypeAlias = Any
"""A transformers model, or one in a PeftModel: torch types their attributes as tensors, so no stricter type holds."""

LogProbs: TypeAlias = NDArray[np.float32]

PROMPTS, ANSWER = 16, 24
"""Prompts that are asked, at most, and tokens of an answer."""

LONGEST = 512
"""Tokens of a prompt that is asked, at most; longer ones are taken only where there are no others."""

MOST_POSITIONS, LEAST_POSITIONS = 96, ANSWER + 8
HELD = 512 << 20
"""Bytes of distributions that are held."""


@dataclass(frozen=True)
class Asked:
    """A prompt and its greedy answer, as token ids, the token that ended it left out.

    log_probs: [P, V] of the last P positions of prompt + answer; the last one follows the answer's last token.
    """

    prompt: list[int]
    answer: list[int]
    stopped: bool
    log_probs: LogProbs

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.answer]

    @property
    def start(self) -> int:
        """The first position that is compared."""
        return len(self.ids) - len(self.log_probs)


@dataclass(frozen=True)
class Reference:
    """texts: the prompts as text. asked: what was said to each. ends: token ids that end an answer. base_kl: mean KL
    divergence of the base without its adapter, nats a token; None where there is no adapter. left_out: prompts that
    were not asked."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    asked: list[Asked]
    ends: frozenset[int]
    base_kl: float | None
    left_out: int

    @classmethod
    def of(cls, model: Model, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Reference:
        """Ask the model. prompts: rendered text, generation prompt included. Raises WhetError where there are none."""
        texts = choose(tokenizer, prompts)
        ends = end_tokens(model, tokenizer)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        positions = max(LEAST_POSITIONS, min(MOST_POSITIONS, HELD // (4 * vocabulary * len(texts))))
        asked, far = [], []
        with evaluating(model):
            for text in texts:
                prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
                answer, stopped = greedy(model, prompt, ends)
                found = log_probs(model, [*prompt, *answer], positions)
                asked.append(Asked(prompt, answer, stopped, found))
                if hasattr(model, "disable_adapter"):
                    with model.disable_adapter():
                        far.append(divergence(found, log_probs(model, [*prompt, *answer], positions)))
        base_kl = float(np.concatenate(far).mean()) if far else None
        return cls(model, tokenizer, texts, asked, ends, base_kl, len(prompts) - len(texts))


def choose(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """PROMPTS of the prompts at most, spread evenly over those that are short enough; the shortest where none is."""
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prompts]
    fitting = [text for text, length in zip(prompts, lengths, strict=True) if 0 < length <= LONGEST]
    if not fitting:
        fitting = [text for length, text in sorted(zip(lengths, prompts, strict=True)) if length][:1]
    if not fitting:
        raise WhetError(
            "there is no prompt to compare answers on", where="proof", fix="name a file of prompts: --prompts FILE"
        )
    step = max(1.0, len(fitting) / PROMPTS)
    return [fitting[int(i * step)] for i in range(min(PROMPTS, len(fitting)))]


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer: the model's and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return frozenset(token for token in found if token is not None)


def greedy(model: Model, prompt: list[int], ends: frozenset[int]) -> tuple[list[int], bool]:
    """The greedy answer to a prompt, without the token that ends it, and whether one did."""
    ids = torch.tensor([prompt], device=model.device)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=ANSWER,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        use_cache=True,
    )
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    answer: list[int] = out[0, len(prompt) :].tolist()
    stopped = bool(answer) and answer[-1] in ends
    return (answer[:-1] if stopped else answer), stopped


def log_probs(model: Model, ids: list[int], positions: int) -> LogProbs:
    """[P, V]: natural logarithms of the next token's probabilities at the last P positions, P = min(positions, T)."""
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -positions:]
    found: LogProbs = logits.float().log_softmax(-1).cpu().numpy()
    return found


SMALLEST = -103.0
"""Logarithm of the smallest number that fp32 holds: engines that give probabilities give 0 below it."""


def divergence(p: LogProbs, q: LogProbs) -> NDArray[np.float64]:
    """KL(p || q) of each position, nats [P].

    KL = sum_v p_v (ln p_v - ln q_v)
    """
    wide_p, wide_q = p.astype(np.float64), np.maximum(q, SMALLEST).astype(np.float64)
    found: NDArray[np.float64] = (np.exp(wide_p) * (np.maximum(wide_p, SMALLEST) - wide_q)).sum(-1)
    return np.maximum(found, 0.0)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
