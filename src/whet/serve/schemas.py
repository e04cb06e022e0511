"""What clients send: OpenAI's requests for chat, completions and embeddings, as far as an engine here can serve them.

A field that would change the answer and can't be honoured is refused, and so is a field nobody knows: an answer made
without it would be taken for one made with it. Fields that are for OpenAI's own books (user, metadata, ...) are taken
and mean nothing. null stands for a field that is not given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from whet.serve.interface import Sampling

INT64 = 2**63 - 1
MAX_STOPS = 16
MAX_BIASES = 1024
MAX_TOOLS = 128
MAX_MESSAGES = 4096
MAX_INPUTS = 8192


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


# ---------------------------------------------------------------- messages


class TextPart(Body):
    type: Literal["text"]
    text: str


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


def _text_or_parts(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None


EITHER = Discriminator(
    _text_or_parts, custom_error_type="content", custom_error_message="text is wanted, or a list of its parts"
)
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(min_length=1), Tag("parts")],
    EITHER,
]
AnswerContent = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart | RefusalPart], Field(min_length=1), Tag("parts")],
    EITHER,
]
Name = Annotated[str | None, Field(max_length=64)]


class FunctionCall(Body):
    name: str = Field(min_length=1, max_length=256)
    arguments: str = Field(description="A JSON object, as text.")

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, text: str) -> str:
        try:
            value = json.loads(text or "{}")
        except (ValueError, RecursionError):
            raise ValueError("the arguments are not JSON") from None
        if not isinstance(value, dict):
            raise ValueError("the arguments are not a JSON object")
        return text or "{}"


class ToolCall(Body):
    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"]
    function: FunctionCall


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: Name = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: Name = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: AnswerContent | None = None
    refusal: str | None = None
    name: Name = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(min_length=1, max_length=256)


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return "system" if role == "developer" else role if isinstance(role, str) else None


Message = Annotated[
    Annotated[SystemMessage, Tag("system")]
    | Annotated[UserMessage, Tag("user")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[ToolMessage, Tag("tool")],
    Discriminator(
        _role,
        custom_error_type="role",
        custom_error_message="a message's role is system, developer, user, assistant or tool",
    ),
]


# ---------------------------------------------------------------- tools and forms of the answer


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema.")
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Body):
    type: Literal["text"]


class JsonFormat(Body):
    type: Literal["json_object"]


class NamedSchema(Body):
    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    body: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | JsonFormat | SchemaFormat, Discriminator("type")]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


# ---------------------------------------------------------------- requests

Model = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=INT64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=INT64)]


def _form(value: Any) -> str | None:
    """Which of the four forms an input has; by its first element, so that a fault is told for that form alone."""
    if isinstance(value, list) and value:
        return {str: "texts", int: "ids", list: "lists"}.get(type(value[0]))
    return "text" if isinstance(value, str) else None


Inputs = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TokenId], Field(min_length=1), Tag("ids")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS), Tag("texts")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS), Tag("lists")
    ],
    Discriminator(
        _form,
        custom_error_type="input",
        custom_error_message="text is wanted, or token ids, or a list of texts, or one of lists of token ids",
    ),
]


class _Drawn(Body):
    """The fields that chat and completions share."""

    model: Model
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT64)] | None = Field(
        None, description="Only the so many likeliest tokens; 0 or -1: all. Not OpenAI's."
    )
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Field(max_length=MAX_BIASES)] | None
    ) = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None

    @field_validator("store")
    @classmethod
    def _nothing_is_stored(cls, store: bool | None) -> bool | None:
        if store:
            raise ValueError("answers are not stored here")
        return store

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Drawn:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, index: int = 0, **more: Any) -> Sampling:
        """Of the index-th answer: with a seed each has its own, or all would be the same."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else _wrapped(self.seed + index),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            **more,
        )


class ChatRequest(_Drawn):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have one name")
        if self.tool_choice not in (None, "none", "auto"):
            if not names:
                raise ValueError("tool_choice asks for a tool, and there are no tools")
            if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
                raise ValueError("tool_choice names none of the tools")
            if self.answer_schema is not None:
                raise ValueError("an answer is either a tool's call or has a response_format")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """{} for any JSON object."""
        form = self.response_format
        if isinstance(form, SchemaFormat):
            return form.json_schema.body or {}
        return {} if isinstance(form, JsonFormat) else None

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model hears of. With tool_choice none it hears of none, and so can't call any."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    def plain_messages(self) -> list[dict[str, Any]]:
        """As engines take them: OpenAI's, but content is text, and `developer` is the system."""
        return [_plain(message) for message in self.messages]


class CompletionRequest(_Drawn):
    """POST /v1/completions."""

    prompt: Inputs
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionRequest:
        if self.best_of not in (None, self.count):
            raise ValueError("best_of other than n is not supported")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("echo is for prompts of text")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        return _several(self.prompt)


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    model: Model
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=INT64)] | None = None
    user: str | None = None

    @field_validator("input")
    @classmethod
    def _no_empty_text(cls, given: Any) -> Any:
        if "" in _several(given):
            raise ValueError("a text is empty")
        return given

    @property
    def inputs(self) -> list[str | list[int]]:
        return _several(self.input)


def _several(given: Any) -> list[str | list[int]]:
    """One text, one list of token ids, or several of either: as several."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _wrapped(seed: int) -> int:
    """Into the 64 bits of a signed integer."""
    return (seed + INT64 + 1) % 2**64 - INT64 - 1


def _plain(message: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    made["content"] = _text(message.content)
    if getattr(message, "name", None):
        made["name"] = message.name
    if isinstance(message, ToolMessage):
        made["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        made["content"] = made["content"] or message.refusal or ""
        if message.tool_calls:
            made["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return made


def _text(content: str | Sequence[TextPart | RefusalPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
