"""POST of JSON to an OpenAI-compatible server: a key that no message shows, deadlines, and retries with backoff.

Tried again: 408, 409, 425, 429, 5xx, lost connections, timeouts, and bodies that are no JSON. A wait doubles from try
to try, with jitter, and is as long as the server's Retry-After where it names one. A request has a deadline for the
whole of its reply, since a limit between two bytes lets a server that trickles hold a request for ever.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SecretStr

from whet.errors import WhetError
from whet.retry_after import retry_after

if TYPE_CHECKING:
    import httpx2

FailureKind = Literal["refused", "malformed", "timeout", "rejected", "unavailable"]
"""Why there is no reply:

refused      the model or a content filter declined
malformed    a reply in another shape than asked for
timeout      no whole reply in time
rejected     the server does not take this request
unavailable  no connection, overload or a fault of the server
"""

TRANSIENT = {408, 409, 425, 429}
HOPELESS = {401, 402, 404, 405}  # what meets one request here meets them all
QUOTA = {"insufficient_quota", "billing_hard_limit_reached"}  # 429, yet no wait helps
JSON = {"Content-Type": "application/json"}
LONGEST_WAIT = 60.0  # seconds
LARGEST_REPLY = 2**24  # bytes
SHOWN = 200  # characters of a server's own message


@dataclass(frozen=True)
class Failure:
    """Why there is no reply. The note is one line and holds no key."""

    kind: FailureKind
    note: str


@dataclass(frozen=True)
class Outcome:
    """The reply's JSON object or, after `attempts` requests, why there is none."""

    body: Mapping[str, Any] | None
    failure: Failure | None
    attempts: int


class _Failed(Exception):
    """One request failed.

    again: another try may do better. hopeless: every request would fail alike. wait: seconds that the server asked for.
    """

    def __init__(
        self, kind: FailureKind, note: str, *, again: bool = False, hopeless: bool = False, wait: float | None = None
    ):
        super().__init__(note)
        self.failure, self.again, self.hopeless, self.wait = Failure(kind, note), again, hopeless, wait


def library() -> Any:
    """The HTTP client, which is an extra."""
    try:
        import httpx2
    except ImportError as error:
        raise WhetError("asking an endpoint needs httpx2", where="endpoint", fix='pip install "whet[eval]"') from error
    return httpx2


def key_from(variable: str | None) -> SecretStr | None:
    """The key in that environment variable, white space at its ends cut: files of secrets often end in a line break.

    Raises WhetError when there is none, or one that no HTTP header can hold: the client's own error would show it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise WhetError(f"the environment has no {variable}", where="endpoint.key_env", fix=f"export {variable}=...")
    if not (key.isascii() and key.isprintable()) or " " in key:
        fix = f"export {variable} again, without quotes, spaces and line breaks inside"
        raise WhetError(f"what {variable} holds is no API key", where="endpoint.key_env", fix=fix)
    return SecretStr(key)


class Caller:
    """Sends requests to one server, several at once.

    As long as the server has given no reply at all, a fault that every request would meet (no connection, a wrong key,
    no such model or path) raises WhetError. Later such a fault concerns a request alone: what was paid for is kept.
    """

    def __init__(self, url: str, key: SecretStr | None, *, timeout: float, retries: int, backoff: float):
        """timeout: seconds a request, from its start to the reply's last byte. backoff: seconds of the first wait."""
        self.url, self.timeout, self.retries, self.backoff = url.rstrip("/"), timeout, retries, backoff
        self._key = key
        self._replied = False
        self._jitter = random.Random()

    def client(self, connections: int) -> httpx2.AsyncClient:
        """A client for `post`. It follows no redirects: the key is for this server alone."""
        httpx = library()
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        made: httpx2.AsyncClient = httpx.AsyncClient(timeout=None, limits=limits, auth=_auth(self._key))
        return made

    async def post(self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> Outcome:
        """The reply to `body`, or why there is none. Raises WhetError as the class says."""
        attempt = 0
        while True:
            attempt += 1
            try:
                reply = await self._once(client, path, body)
            except _Failed as failed:
                if (wait := self._wait(failed, attempt)) is None:
                    return self._given_up(failed, attempt)
                await asyncio.sleep(wait)
            else:
                self._replied = True
                return Outcome(reply, None, attempt)

    def _wait(self, failed: _Failed, attempt: int) -> float | None:
        """Seconds until the next try; None where there is to be none."""
        if not failed.again or attempt > self.retries:
            return None
        if failed.wait is None:
            return min(LONGEST_WAIT, self.backoff * 2.0 ** (attempt - 1)) * self._jitter.uniform(0.5, 1.0)
        return failed.wait if failed.wait <= LONGEST_WAIT else None

    def _given_up(self, failed: _Failed, attempts: int) -> Outcome:
        kind, note = failed.failure.kind, failed.failure.note
        if failed.hopeless and not self._replied:
            fix = "check endpoint.url, endpoint.model and endpoint.key_env, and that the server is up"
            raise WhetError(f"the endpoint cannot be used: {note}", where=self.url, fix=fix)
        if failed.wait is not None and failed.wait > LONGEST_WAIT:
            note += f"; the server asks to wait {failed.wait:.0f} s"
        return Outcome(None, Failure(kind, note + (f" ({attempts} tries)" if attempts > 1 else "")), attempts)

    async def _once(self, client: httpx2.AsyncClient, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        httpx = library()
        # escaped: the client's own encoding fails on half a surrogate pair, which is for the server to refuse
        sent = json.dumps(body).encode()
        try:
            async with (
                asyncio.timeout(self.timeout),
                client.stream("POST", f"{self.url}/{path}", content=sent, headers=JSON) as response,
            ):
                content = await _read(response)
        except TimeoutError:
            raise _Failed("timeout", f"no whole reply within {self.timeout:g} s", again=True) from None
        except (httpx.ConnectError, httpx.ProxyError) as error:
            note = f"cannot connect: {self.shown(str(error))}"
            raise _Failed("unavailable", note, again=True, hopeless=True) from None
        except httpx.TransportError as error:
            note = f"the connection was lost: {self.shown(str(error)) or type(error).__name__}"
            raise _Failed("unavailable", note, again=True) from None
        except httpx.DecodingError:
            raise _Failed("malformed", "the reply's compression is damaged", again=True) from None
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.headers, content)
        try:
            reply = json.loads(content)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise _Failed("malformed", "the server's reply is no JSON object", again=True)
        return reply

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> _Failed:
        """What a status other than 200 means."""
        message, codes = _error_in(content)
        note = f"HTTP {status}" + (f": {self.shown(message)}" if message.strip() else "")
        if "content_filter" in codes:
            return _Failed("refused", note)
        if status in HOPELESS or codes & QUOTA or 300 <= status < 400:
            return _Failed("rejected", note, hopeless=True)
        if status in TRANSIENT or status >= 500:
            return _Failed("unavailable", note, again=True, wait=retry_after(headers))
        return _Failed("rejected", note)

    def shown(self, text: str) -> str:
        """A server's words as one line: without the key, which some servers quote, and without control characters."""
        if self._key is not None:
            text = text.replace(self._key.get_secret_value(), "***")
        line = "".join(character if character.isprintable() else " " for character in text)
        line = " ".join(line.split())
        return line if len(line) <= SHOWN else line[:SHOWN] + "…"


async def _read(response: httpx2.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > LARGEST_REPLY:
            raise _Failed("rejected", f"the reply is longer than {LARGEST_REPLY >> 20} MiB")
    return bytes(content)


def _auth(key: SecretStr | None) -> Any:
    """Puts the key into each request as it leaves, so that the client's own settings do not hold it."""
    if key is None:
        return None
    secret = key

    class Bearer(library().Auth):  # type: ignore[misc]
        def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
            request.headers["Authorization"] = f"Bearer {secret.get_secret_value()}"
            yield request

    return Bearer()


def _error_in(content: bytes) -> tuple[str, set[str]]:
    """(the message, code and type) of an error's body, in OpenAI's shape, FastAPI's, or none."""
    text = content[:4096].decode("utf-8", "replace")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return text, set()
    if not isinstance(body, dict):
        return text, set()
    error = body.get("error", body)
    if not isinstance(error, dict):
        return str(error), set()
    message = error.get("message") or error.get("detail") or text
    return str(message), {str(error[name]) for name in ("code", "type") if error.get(name)}
