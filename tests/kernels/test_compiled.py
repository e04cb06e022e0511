"""Kernels as a compiler for a GPU sees them: Triton's interpreter takes what it refuses, and knows no registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from whet.kernels._triton import HAVE_TRITON

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"
MOST_STACK = 96  # bytes of a thread, which attention's kernels spill


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not HAVE_TRITON:
        pytest.skip("needs triton")
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_for_hopper(said: dict[str, Any]) -> None:
    """Catches Python that the interpreter runs and the compiler refuses, and a kernel that nobody compiled."""
    assert len(said["kernels"]) > 20
    assert {one["kernel"] for one in said["compiled"]} == set(said["kernels"])


def test_registers_suffice(said: dict[str, Any]) -> None:
    """Catches a tile or a branch whose values no longer fit: they go through memory, and no other test sees it."""
    spilled = defaultdict(set)
    for one in said["compiled"]:
        spilled[one["kernel"]].add(one["stack"])
    most = {kernel: max(stacks) for kernel, stacks in spilled.items() if max(stacks)}
    assert set(most) <= {"_forward_kernel", "_keys_kernel", "_queries_kernel"}, most
    assert max(most.values(), default=0) <= MOST_STACK, most


def test_shared_memory_suffices(said: dict[str, Any]) -> None:
    """Catches a tile that Hopper's 227 KB do not hold."""
    assert max(one["shared"] for one in said["compiled"]) <= 227 * 1024
