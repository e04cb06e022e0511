"""Checkpoints that several tests read, written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.families import FAMILIES, write_checkpoint


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family's name in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(family, dtype) -> a folder with that family's random model, not to be written into."""

    @cache
    def folder(name: str, dtype: torch.dtype = torch.float32) -> Path:
        return write_checkpoint(tmp_path_factory.mktemp(name), name, dtype)

    return folder
