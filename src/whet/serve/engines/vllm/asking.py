"""A request in the server's words.

Every setting is said, also where it is the usual one: vLLM fills in what is missing from the model's
generation_config.json, and an answer would then depend on the engine. What only vLLM knows is said to vLLM alone.

**Tools.** vLLM is told not to look for calls, and to leave special tokens in the text: the gateway reads calls of all
families out of it, so vLLM needs no --tool-call-parser. Other servers find calls themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whet.serve.interface import Request, Sampling

CHAT, COMPLETION, EMBEDDING = "/chat/completions", "/completions", "/embeddings"
FORM = "answer"
"""The name that a schema must have."""


def body_of(request: Request, model: str, context: int, *, vllm: bool) -> tuple[str, dict[str, Any]]:
    """The path and the body. model: the server's own name for it. context: tokens; an answer as long as that is one
    without a limit, and vLLM clips to what the prompt leaves only where none is said."""
    sampling = request.sampling
    body = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": None if sampling.max_tokens >= context else sampling.max_tokens,
        **_drawing(sampling),
    }
    if vllm:
        body |= _only_vllm(sampling, special=bool(request.tools))
    elif sampling.top_k:
        body["top_k"] = sampling.top_k
    if request.messages is None:
        return COMPLETION, body | _completion(request)
    return CHAT, body | _chat(request, vllm=vllm)


def embedding_body(model: str, texts: Sequence[str | Sequence[int]]) -> dict[str, Any]:
    inputs = [text if isinstance(text, str) else list(text) for text in texts]
    return {"model": model, "input": inputs, "encoding_format": "float"}


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """OpenAI's own fields."""
    said: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.seed is not None:
        said["seed"] = sampling.seed
    if sampling.stop:
        said["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        said["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.schema is not None:
        said["response_format"] = _form(sampling.schema)
    return said


def _form(schema: Mapping[str, Any]) -> dict[str, Any]:
    if not schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": FORM, "schema": dict(schema), "strict": True}}


def _only_vllm(sampling: Sampling, *, special: bool) -> dict[str, Any]:
    """top_k -1: all tokens. special: whether the text has special tokens."""
    return {
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": not special,
    }


def _chat(request: Request, *, vllm: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"messages": [dict(message) for message in request.messages or ()]}
    if request.sampling.logprobs is not None:
        said |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    if request.tools:
        said |= {"tools": [dict(tool) for tool in request.tools], "tool_choice": "none" if vllm else "auto"}
    return said


def _completion(request: Request) -> dict[str, Any]:
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt or ())
    said: dict[str, Any] = {"prompt": prompt}
    if request.sampling.logprobs is not None:
        said["logprobs"] = request.sampling.logprobs
    return said
