"""What tests on a GPU share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Several test processes share a GPU: what one has cached, another can't have. And a test that leaves its process
    on another stream would have the next ones read what is not there yet."""
    yield
    if torch.cuda.is_available() and torch.cuda.current_stream() != torch.cuda.default_stream():
        torch.cuda.set_stream(torch.cuda.default_stream())
        pytest.fail("the current stream is not the default one any more")
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
