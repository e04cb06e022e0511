"""Checkpoints that several tests read, written once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.families import FAMILIES, write_checkpoint
from whet.models import fused
from whet.models.block import Block


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


@pytest.fixture
def through_block(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """The blocks that have run, layer by layer and pass by pass: empty where layers take the generic path."""
    run, seen = fused.run, []

    def counted(block: Block, *arguments: Any) -> torch.Tensor:
        seen.append(block)
        return run(block, *arguments)

    monkeypatch.setattr(fused, "run", counted)
    return seen
