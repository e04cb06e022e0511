"""Where a result comes from: hardware, versions, commit and date, as every line under bench/results carries them."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth", "flash-attn-4",
)  # fmt: skip


def origin(*also: str) -> dict[str, Any]:
    """The fields that say where, with what and when a result was measured. `also`: further distributions to name."""
    return {
        "hardware": hardware(),
        "versions": versions(*also),
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hardware() -> str:
    """The GPU's name, or the processor's and how many threads torch uses on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*also: str) -> dict[str, str]:
    """Version by distribution, of those that are installed; whet's own from its source."""
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, *also):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether tracked files differ from it; None where there is no git."""
    try:
        revision = _git("rev-parse", "HEAD")
        return {"commit": revision[:12], "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
