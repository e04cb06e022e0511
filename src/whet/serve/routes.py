"""The addresses: OpenAI's under /v1, probes and metrics."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from whet.serve.access_log import Record
from whet.serve.answers import (
    ChatCompletion,
    Completion,
    EmbeddingData,
    EmbeddingList,
    EmbeddingUsage,
    Error,
    ModelCard,
    ModelList,
    Status,
)
from whet.serve.auth import Identity
from whet.serve.chat import Chat
from whet.serve.completions import Completing
from whet.serve.drain import Drain
from whet.serve.errors import ApiError, from_engine, no_such_model
from whet.serve.interface import Engine, ServedModel
from whet.serve.limits import Settings
from whet.serve.metrics import CONTENT_TYPE, Metrics
from whet.serve.schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from whet.serve.stream import EventStream

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 403, 404, 408, 413, 415, 421, 429, 500, 503)
}
EVENTS: dict[str, Any] = {"content": {"text/event-stream": {}}}

router = APIRouter(responses=REFUSALS)


@dataclass
class Desk:
    """What the routes work with. started: when the models came up, as `created` says it."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    drain: Drain
    started: int = field(default_factory=lambda: int(time.time()))

    def model(self, name: str, record: Record, kind: str) -> ServedModel:
        """kind: what it is to do. Raises ApiError: 404 for one that is not there, or not for this key; 400."""
        assert record.identity is not None  # the gate lets nobody in without
        record.identity.check_model(name)
        for model in self.engine.models():
            if model.name == name:
                record.model = name
                self._check_kind(model, kind)
                return model
        raise no_such_model(name)

    def _check_kind(self, model: ServedModel, kind: str) -> None:
        if (model.kind == "embedding") != (kind == "embedding") or (kind == "chat" and model.kind == "completion"):
            raise ApiError(400, f"{model.name} is no model for this: its kind is {model.kind}.", param="model")

    def max_tokens(self, asked: int | None, model: ServedModel) -> int:
        """Of one answer. Where nothing is asked, as many as fit."""
        most = min(model.context, self.settings.max_tokens or model.context)
        if asked is not None and asked > most:
            raise ApiError(400, f"An answer may have {most} tokens at most, not {asked}.", param="max_tokens")
        return asked or most

    def check_count(self, count: int, param: str) -> None:
        if count > self.settings.max_choices:
            raise ApiError(400, f"At most {self.settings.max_choices} answers to one request.", param=param)


def desk_of(request: Request) -> Desk:
    found: Desk = request.app.state.desk
    return found


def record_of(request: Request) -> Record:
    found: Record = request.state.record
    return found


AtDesk = Annotated[Desk, Depends(desk_of)]
Noted = Annotated[Record, Depends(record_of)]


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses={200: EVENTS})
async def chat(body: ChatRequest, desk: AtDesk, record: Noted) -> Response:
    """An answer to a conversation; with `stream`, events of it as it is written."""
    model = desk.model(body.model, record, "chat")
    desk.check_count(body.count, "n")
    asked = Chat(body, model, desk.engine, record, desk.max_tokens(body.limit, model))
    return await _answered(asked, bool(body.stream), record)


@router.post("/v1/completions", response_model=Completion, responses={200: EVENTS})
async def completions(body: CompletionRequest, desk: AtDesk, record: Noted) -> Response:
    """What follows a text; with `stream`, events of it as it is written."""
    model = desk.model(body.model, record, "completion")
    desk.check_count(body.count * len(body.prompts), "n" if body.count > 1 else "prompt")
    asked = Completing(body, model, desk.engine, record, desk.max_tokens(body.limit, model))
    return await _answered(asked, bool(body.stream), record)


async def _answered(asked: Chat | Completing, stream: bool, record: Record) -> Response:
    record.stream = stream
    if record.keep:
        record.request = asked.body.model_dump(mode="json", exclude_unset=True)
    if stream:
        return await EventStream.begun(asked.events(), record)
    answer = await asked.whole()
    return Response(answer.model_dump_json(), media_type="application/json")


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def embeddings(body: EmbeddingRequest, desk: AtDesk, record: Noted) -> Response:
    """A vector for each text."""
    model = desk.model(body.model, record, "embedding")
    if len(body.inputs) > desk.settings.max_inputs:
        raise ApiError(400, f"At most {desk.settings.max_inputs} inputs to one request.", param="input")
    try:
        found = await desk.engine.embed(model.name, body.inputs)
    except Exception as error:
        if (refusal := from_engine(error, model.name)) is None:
            raise
        raise refusal from error
    width = len(found.vectors[0])
    if body.dimensions not in (None, width):
        raise ApiError(400, f"{model.name} makes vectors of {width} numbers.", param="dimensions")
    record.prompt_tokens = found.tokens
    answer = EmbeddingList(
        model=model.name,
        data=[
            EmbeddingData(index=index, embedding=_packed(vector) if body.encoding_format == "base64" else list(vector))
            for index, vector in enumerate(found.vectors)
        ],
        usage=EmbeddingUsage(prompt_tokens=found.tokens, total_tokens=found.tokens),
    )
    return Response(answer.model_dump_json(), media_type="application/json")


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


@router.get("/v1/models")
async def models(desk: AtDesk, record: Noted) -> ModelList:
    """Those that this key may use."""
    identity = record.identity
    assert identity is not None
    return ModelList(data=[_card(model, desk) for model in desk.engine.models() if identity.may_use(model.name)])


@router.get("/v1/models/{model:path}")
async def model(model: str, desk: AtDesk, record: Noted) -> ModelCard:
    identity: Identity | None = record.identity
    assert identity is not None
    identity.check_model(model)
    for served in desk.engine.models():
        if served.name == model:
            return _card(served, desk)
    raise no_such_model(model)


def _card(model: ServedModel, desk: Desk) -> ModelCard:
    return ModelCard(id=model.name, created=desk.started, context=model.context, kind=model.kind, parent=model.parent)


@router.get("/health")
async def health() -> Status:
    """The process lives."""
    return Status(status="ok")


@router.get("/ready", response_model=Status)
async def ready(desk: AtDesk) -> Response:
    """503 until the models are there, and once the server goes down."""
    state = desk.drain.state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(desk: AtDesk) -> Response:
    """For Prometheus; the key needs the scope `metrics`."""
    desk.metrics.draining.set(desk.drain.draining)
    load = getattr(desk.engine, "load", None)  # not every engine can say
    return Response(desk.metrics.text(load() if load else {}), media_type=CONTENT_TYPE)
