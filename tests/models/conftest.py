"""One tiny Llama on disk for the tests of loading, and copies of it to break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity.families import write_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model folder, not to be written into."""
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Callable[[], Path]:
    """broken() -> a copy of the model folder, to be damaged."""
    return lambda: Path(shutil.copytree(llama, tmp_path / "model"))
