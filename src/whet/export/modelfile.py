"""Ollama's Modelfile for a GGUF file: the template in Go's language, stop tokens, parameters, the base's licence.

Source: Ollama's documentation of the Modelfile (FROM, TEMPLATE, PARAMETER, LICENSE) and of its templates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from whet.export.go_template import go_template, json_text, read_turns

MOST_CONTEXT = 8192
"""Tokens of context that Ollama is told to hold: it reserves their memory when it loads. A user may ask for more."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
NAMES = {"repetition_penalty": "repeat_penalty"}


def modelfile(
    gguf: str,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    *,
    ends: Iterable[int],
    context: int,
    adds_bos: bool,
    licence: str | None = None,
) -> str:
    """The Modelfile's text.

    gguf: the file's name, in the same folder. ends: token ids that end an answer. context: tokens that the model can
    read. adds_bos: the file says that BOS goes before every text. licence: the base's, in full.
    Raises WhetError for a chat template that has no equal in Go's language.
    """
    turns = read_turns(tokenizer)
    template = go_template(turns, str(tokenizer.bos_token) if adds_bos else None)
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{template}"""']
    if turns.with_system is None:
        lines.insert(0, "# The chat template has no system message: one that is given is left out.")
    stops = tokenizer.convert_ids_to_tokens(sorted(ends))
    lines += [f"PARAMETER stop {json_text(stop)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}"]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters(generation).items()]
    if licence and '"""' not in licence:
        lines.append(f'LICENSE """{licence}"""')
    return "\n".join(lines) + "\n"


def parameters(generation: GenerationConfig) -> dict[str, Any]:
    """How the model's own settings draw tokens, in Ollama's names; temperature 0 where they take the likeliest."""
    if not generation.do_sample:
        return {"temperature": 0}
    given = {name: getattr(generation, name, None) for name in SAMPLING}
    return {NAMES.get(name, name): value for name, value in given.items() if value is not None}
