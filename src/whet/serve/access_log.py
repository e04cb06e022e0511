"""What is written down of each request: one JSON line when it has ended.

    {"time": "2027-01-31T09:30:00.120Z", "id": "req_...", "method": "POST", "path": "/v1/chat/completions",
     "status": 200, "key": "billing", "model": "tuned", "stream": true, "prompt_tokens": 31, "completion_tokens": 12,
     "finish": "stop", "first_token_seconds": 0.041, "seconds": 0.207, "error": null, "left": false}

Never the key itself, and no word of prompt or answer unless the operator asks for `content`. Texts from outside are
JSON strings: none of them can begin a line of its own.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.serve.auth import PUBLIC, SCOPES, Identity
from whet.serve.limits import Account

OTHER = "other"
KNOWN = {*PUBLIC, *SCOPES}


@dataclass
class Record:
    """One request, filled in while it is served. Times in seconds of the monotonic clock."""

    method: str
    path: str
    id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    started: float = field(default_factory=time.monotonic)
    identity: Identity | None = None
    account: Account | None = None
    status: int = 0
    model: str | None = None
    """A served model's name; a name that nobody knows is not written down."""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None
    first_token: float | None = None
    error: str | None = None
    left: bool = False
    """The client went away, or read nothing any more, before its answer was whole."""
    cut: bool = False
    """The server goes down, and the answer must end before it is whole."""
    keep: bool = False
    """Whether what is asked and answered is written down too."""
    request: Any = None
    answers: dict[int, str] = field(default_factory=dict)

    @property
    def route(self) -> str:
        """The path where it is one of ours: anything could stand in another, a key as well."""
        if self.path in KNOWN:
            return self.path
        return "/v1/models" if self.path.startswith("/v1/models/") else OTHER

    def token(self) -> None:
        """The first one's time counts."""
        if self.first_token is None:
            self.first_token = time.monotonic()

    def said(self, index: int, text: str) -> None:
        """More of the index-th answer, as the engine wrote it."""
        if self.keep:
            self.answers[index] = self.answers.get(index, "") + text

    def line(self) -> dict[str, Any]:
        now = datetime.now(UTC)
        first = None if self.first_token is None else round(self.first_token - self.started, 4)
        written = {
            "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "id": self.id,
            "method": self.method,
            "path": self.route,
            "status": self.status,
            "key": self.identity.name if self.identity else None,
            "model": self.model,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish": self.finish,
            "first_token_seconds": first,
            "seconds": round(time.monotonic() - self.started, 4),
            "error": self.error,
            "left": self.left,
        }
        kept = {"request": self.request, "answers": [self.answers[index] for index in sorted(self.answers)]}
        return written | (kept if self.keep else {})


class AccessLog:
    """To a file, reopened where it was moved away (logrotate); without a path to stderr. content: prompts, answers.

    Raises WhetError for a file that can't be written.
    """

    def __init__(self, path: Path | None = None, *, content: bool = False):
        self.content = content
        self._logger = logging.Logger("whet.serve.requests", logging.INFO)  # no child of the root: nobody else's format
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        if path is not None:
            try:
                path.touch(mode=0o600)
                handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
            except OSError as error:
                fix = "give a file that this user may write, in a folder that is there"
                raise WhetError(f"the log can not be written: {error.strerror}", where=str(path), fix=fix) from error
        self._logger.addHandler(handler)

    def write(self, record: Record) -> None:
        self._logger.info("%s", json.dumps(record.line(), ensure_ascii=True))

    def close(self) -> None:
        for handler in self._logger.handlers:
            handler.close()
