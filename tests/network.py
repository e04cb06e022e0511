"""The suite's own rule about the network: a test fails when it, or a process that it starts, leaves the machine.

Also a pytest plugin by itself (`-p tests.network`), which is how the rule is tested.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

OFFLINE = str(Path(__file__).parent / "offline")
_, name = tempfile.mkstemp(prefix="whet-connections-")
CONNECTIONS = Path(name)
atexit.register(CONNECTIONS.unlink, missing_ok=True)

os.environ["WHET_CONNECTIONS"] = name
folders = [OFFLINE, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, folders))  # the children start in other folders
sys.path.insert(0, OFFLINE)
sys.modules.pop("sitecustomize", None)
import sitecustomize  # noqa: E402, F401 (puts the hook in place)


@pytest.fixture(autouse=True)
def no_connections() -> Iterator[Path]:
    """The file that refused connections are noted in; the test fails when it is not empty at the end."""
    CONNECTIONS.write_text("")
    yield CONNECTIONS
    tried = CONNECTIONS.read_text()
    assert not tried, f"a connection was tried:\n{tried}"
