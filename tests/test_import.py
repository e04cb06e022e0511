"""`import whet` costs nothing and changes nothing: no libraries, no network, few modules."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import whet

PROBE = """
import json, sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith("socket.") else None)
before = set(sys.modules)
import whet
print(json.dumps({"modules": sorted(set(sys.modules) - before), "sockets": sockets}))
"""
HEAVY = {"torch", "transformers", "numpy", "trl", "peft", "datasets", "pydantic", "bitsandbytes", "pyarrow", "rich"}


@pytest.fixture(scope="module")
def probe() -> dict[str, list[str]]:
    """What a fresh interpreter loads and calls on `import whet`."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_no_library_is_imported(probe: dict[str, list[str]]) -> None:
    """Catches a top-level import that makes every command wait for torch."""
    assert not HEAVY & {name.split(".")[0] for name in probe["modules"]}
    assert "whet" in probe["modules"]


def test_few_modules_are_imported(probe: dict[str, list[str]]) -> None:
    """Stands for the time it takes, which a test can't measure without flaking."""
    assert len(probe["modules"]) <= 20


def test_no_socket_is_opened(probe: dict[str, list[str]]) -> None:
    """Catches telemetry and checks for new versions."""
    assert probe["sockets"] == []


@pytest.mark.parametrize("name", whet.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Catches a lazy name whose home moved."""
    assert getattr(whet, name) is not None
    assert name in dir(whet)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Catches `hasattr(whet, ...)` raising something else."""
    assert not hasattr(whet, "FastDiffusionModel")
