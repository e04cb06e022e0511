"""Fixtures of several evaluation tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.evals.openai_server import OpenAIServer


@pytest.fixture(scope="session")
def running_server() -> Iterator[OpenAIServer]:
    from tests.evals.openai_server import OpenAIServer  # loads FastAPI and a model, which few tests need

    with OpenAIServer() as server:
        yield server


@pytest.fixture
def server(running_server: OpenAIServer) -> OpenAIServer:
    """An OpenAI-compatible server on this machine that answers every request and has seen none yet."""
    running_server.policy = lambda body: None
    running_server.key, running_server.most_at_once = None, 0
    running_server.requests.clear()
    return running_server
