"""What a run ran on: every installed version, whet's own code, hardware, git state. And how two such records differ."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path
from typing import Any

PACKAGES = (
    "whet",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "tokenizers",
    "gguf",
)
"""Those whose versions are shown first."""
DECISIVE = ("machine", "processor", "capability", "threads", "gpus", "driver")
"""What of the hardware changes the last bits of a result."""


@dataclass(frozen=True)
class Difference:
    """kind: version, hardware, input or code. then, now: as text, None where it is missing."""

    kind: str
    name: str
    then: str | None
    now: str | None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.then or 'nothing'} then, {self.now or 'nothing'} now"


def environment(base: Path) -> dict[str, Any]:
    """What one needs to know to repeat a run whose recipe lies in `base`."""
    installed = lock()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "base": str(base.absolute()),
        "versions": {"python": platform.python_version()} | {n: installed.get(n, "not installed") for n in PACKAGES},
        "lock": installed,
        "code": code_digest(),
        "hardware": hardware(),
        "git": _git_state(base),
    }


def differences(record: Mapping[str, Any]) -> list[Difference]:
    """What of an earlier `environment`, as run.json holds it, is otherwise here and now, if it can change a result.

    Versions count of Python and of what whet needs, directly or through others; a test runner's does not.
    """
    found = []
    then, now = dict(record.get("lock", {})), lock()
    python = record.get("versions", {}).get("python")
    if python != platform.python_version():
        found.append(Difference("version", "python", python, platform.python_version()))
    for name in sorted(needed()):
        if name != "whet" and then.get(name) != now.get(name):
            found.append(Difference("version", name, then.get(name), now.get(name)))
    if record.get("code") != code_digest():
        found.append(Difference("code", "whet", _short(record.get("code")), _short(code_digest())))
    had, has = record.get("hardware", {}), hardware()
    for name in DECISIVE:
        if had.get(name) != has[name]:
            found.append(Difference("hardware", name, _text(had.get(name)), _text(has[name])))
    return found


@cache
def lock() -> dict[str, str]:
    """Version by name of every installed distribution, sorted."""
    found = {_canonical(d.metadata["Name"]): d.version for d in distributions() if d.metadata["Name"]}
    return dict(sorted(found.items()))


def needed(root: str = "whet") -> set[str]:
    """The distributions that `root` needs, itself included, without optional ones."""
    found: set[str] = set()
    ahead = [root]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead += _requires(name)
    return found


@cache
def _requires(name: str) -> list[str]:
    """Names of a distribution's requirements; what another system needs is installed nowhere and differs nowhere."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    plain = [line for line in lines if "extra ==" not in line]
    return [_canonical(match[0]) for line in plain if (match := re.match(r"[A-Za-z0-9._-]+", line))]


def _canonical(name: str) -> str:
    """A distribution's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def code_digest() -> str:
    """Hex SHA-256 of whet's own files, whose version may stay while they change."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def hardware() -> dict[str, Any]:
    """The machine. capability: the vector instructions that torch uses. threads: torch's. memory: bytes."""
    import torch

    count = torch.cuda.device_count()
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "gpu_memory": [torch.cuda.get_device_properties(i).total_memory for i in range(count)],
        "driver": _first_line(Path("/proc/driver/nvidia/version")) if count else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Of the recipe's repository: commit, whether it has changes, and SHA-256 of those; None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD").decode("ascii").strip()
        changed = bool(_git(folder, "status", "--porcelain"))
        patch = hashlib.sha256(_git(folder, "diff", "--binary", "HEAD")).hexdigest() if changed else None
        return {"commit": commit, "changed": changed, "diff": patch}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True).stdout


def _short(digest: str | None) -> str | None:
    return digest[:12] if digest else None


def _text(value: Any) -> str | None:
    return None if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
