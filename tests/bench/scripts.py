"""Loads a script of bench/, which is no package, as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    sys.path.insert(0, str(BENCH))  # as when it is run: scripts import each other
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))  # bench/quickstart.py must not be taken for the package of that name
    return module
