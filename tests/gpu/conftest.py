"""What tests on a GPU share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Several test processes share a GPU: what one has cached, another can't have."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
