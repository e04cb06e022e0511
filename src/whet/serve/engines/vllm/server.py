"""HTTP to the server: one client, and what its statuses and lost connections mean to an engine.

    400, 413, 422 and their like    Refused: the client's request
    404 for a model                 UnknownModel
    429                             Busy, for as long as Retry-After says
    401, 403                        KeyRefused: whet's own key is at fault, and no client's
    3xx, other 4xx, 5xx, silence    EngineDown

Redirections are not followed, no proxy of the environment is used, and certificates are checked: prompts and the key
go to the address that the operator gave, or nowhere. Messages hold no key, though some servers quote it.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from pydantic import SecretStr

from whet.retry_after import retry_after
from whet.serve.engines.vllm.address import Address
from whet.serve.engines.vllm.settings import Settings
from whet.serve.interface import Busy, EngineDown, Refused, UnknownModel

EVENT = 16 * 2**20
"""Bytes of one event at most."""
REPLY = 256 * 2**20
"""Bytes of a whole reply at most: 2,048 vectors of 4,096 numbers, as text, and some."""
FAULT = 64 * 2**10
"""Bytes that are read of an error."""
SHOWN = 300
"""Characters of a server's own message that are passed on."""
KEPT = 2.0
"""Seconds that an idle connection is used again: vLLM closes it after five, and a request sent just then is lost."""

OUR_FAULT = (401, 403)
NOT_THE_REQUEST = (405, 407, 408, 421, 425)
"""4xx that are between this server and the other."""


class KeyRefused(EngineDown):
    """The server does not take the key it was sent, or wants one."""


class Server:
    """An OpenAI-compatible server. All methods raise Refused, Busy or EngineDown."""

    def __init__(self, address: Address, settings: Settings):
        self._url, self._key, self._silence = address.url, address.key, settings.silence
        self._client = httpx2.AsyncClient(
            auth=None if address.key is None else Bearer(address.key),
            headers={"accept-encoding": "identity", "user-agent": "whet"},
            timeout=httpx2.Timeout(settings.silence, connect=settings.connect, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT),
            verify=httpx2.create_ssl_context(),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str) -> bytes:
        """The reply's body."""
        async with self._asked("GET", path) as response:
            return await _read(response, REPLY)

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The reply's body."""
        async with self._asked("POST", path, body) as response:
            return await _read(response, REPLY)

    @asynccontextmanager
    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """The data of each event of a stream, as they come. Leaving the block early closes the connection."""
        async with self._asked("POST", path, body) as response:
            yield (event.data async for event in httpx2.EventSource(response, max_event_size=EVENT))

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        # escaped: half a surrogate pair can't be encoded, and is for the server to refuse
        content = None if body is None else json.dumps(body).encode("ascii")
        try:
            async with self._client.stream(method, f"{self._url}{path}", content=content, headers=JSON) as response:
                if response.status_code != 200:
                    raise self._refusal(response, await _read(response, FAULT, cut=True), body or {})
                yield response
        except httpx2.TimeoutException as error:
            late = isinstance(error, httpx2.ConnectTimeout)
            what = "can not be reached in time" if late else f"has been silent for {self._silence:g} s"
            raise EngineDown(f"the models' server {what}") from None
        except httpx2.ConnectError as error:
            raise EngineDown(f"the models' server can not be reached: {self.shown(str(error))}") from None
        except httpx2.RequestError as error:
            why = self.shown(str(error)) or type(error).__name__
            raise EngineDown(f"the connection to the models' server was lost: {why}") from None

    def _refusal(self, response: httpx2.Response, content: bytes, asked: Collection[str]) -> Exception:
        status, fault = response.status_code, Fault.read(content)
        said = self.shown(fault.message)
        if status == 429:
            return Busy(retry_after(response.headers) or 1.0)
        if status in OUR_FAULT:
            return KeyRefused(f"the models' server refuses the key that it was sent, or wants one (HTTP {status})")
        if 300 <= status < 400:
            return EngineDown(f"the models' server sends its clients elsewhere (HTTP {status}), which is not followed")
        if status == 404 and fault.about_model:
            return UnknownModel(said, "model")
        if (400 <= status < 500 and status not in NOT_THE_REQUEST) or status == 501:
            return Refused(said or f"the models' server refuses this (HTTP {status})", fault.param_of(asked))
        return EngineDown(f"the models' server answers HTTP {status}{': ' if said else ''}{said}")

    def fault_in(self, error: Any, asked: Collection[str]) -> Exception:
        """What an error means that came as an event, in a stream that had begun with 200, as vLLM's refusals do that
        its engine makes. asked: the fields that were sent."""
        fault = Fault.of(error)
        said = self.shown(fault.message)
        if fault.status == 429:
            return Busy()
        if fault.refuses:
            return Refused(said, fault.param_of(asked))
        return EngineDown(f"the models' server failed: {said}")

    def shown(self, text: str) -> str:
        """A server's words as one line, without the key and without control characters."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "***")
        line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
        return line if len(line) <= SHOWN else line[:SHOWN] + "…"


JSON = {"content-type": "application/json"}


class Bearer(httpx2.Auth):
    """Puts the key into each request as it leaves, so that the client's own settings do not hold it."""

    def __init__(self, key: SecretStr):
        self._key = key

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        request.headers["authorization"] = f"Bearer {self._key.get_secret_value()}"
        yield request


class Fault:
    """An error's body, in OpenAI's shape, FastAPI's, or none. vLLM's `code` is the status; OpenAI's a word."""

    def __init__(self, message: str, fields: Mapping[str, Any]):
        self.message, self._fields = message, fields

    @classmethod
    def read(cls, content: bytes) -> Fault:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            return cls(content.decode("utf-8", "replace"), {})
        return cls.of(body.get("error", body) if isinstance(body, dict) else body)

    @classmethod
    def of(cls, error: Any) -> Fault:
        if not isinstance(error, dict):
            return cls(str(error), {})
        return cls(str(error.get("message") or error.get("detail") or ""), error)

    def param_of(self, asked: Collection[str]) -> str | None:
        """The field at fault, of those that were sent: vLLM also blames what is none of them, as `input_tokens`."""
        found = self._fields.get("param")
        return found if isinstance(found, str) and found in asked else None

    @property
    def status(self) -> int | None:
        code = self._fields.get("code")
        return code if isinstance(code, int) else None

    @property
    def about_model(self) -> bool:
        return self._fields.get("param") == "model" or self._fields.get("code") == "model_not_found"

    @property
    def refuses(self) -> bool:
        if self.status is None:
            return self._fields.get("type") == "invalid_request_error"
        return 400 <= self.status < 500 and self.status not in (*OUR_FAULT, *NOT_THE_REQUEST)


async def _read(response: httpx2.Response, limit: int, *, cut: bool = False) -> bytes:
    """The body. cut: what lies beyond the limit is left out; else raises EngineDown for more."""
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > limit:
            if cut:
                break
            raise EngineDown(f"a reply of more than {limit >> 20} MiB")
    return bytes(content[:limit])
