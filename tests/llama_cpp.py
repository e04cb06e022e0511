"""The real llama.cpp for tests: one installation in the repository's `.node/` folder, shared by every test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from whet.export import llama_cpp as runner

FOLDER = Path(__file__).parents[1] / ".node"


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder llama.cpp is installed in, with WHET_NODE set to it. Fails where it cannot be installed.

    WHET_NO_NPM=1 turns that failure into a skip.
    """
    if os.environ.get("WHET_NO_NPM") == "1":
        pytest.skip("WHET_NO_NPM=1: tests against llama.cpp are left out")
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.fail("node and npm are needed to run llama.cpp; install them, or set WHET_NO_NPM=1 to skip these tests")
    os.environ.setdefault("WHET_NODE", str(FOLDER))
    return runner.install()
