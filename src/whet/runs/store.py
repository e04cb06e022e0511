"""A run and its folder: what was asked for, what it ran on, what came out.

    runs/NAME-DIGEST/
      recipe.yaml      the resolved recipe, defaults included
      run.json         digests of the inputs, versions, hardware, git state
      metrics.jsonl    one JSON object a line
      checkpoints/     while training, and the last two after it
      STAGE/           what a stage made: there whole, or not at all

The digest covers the recipe and its input files: the same inputs lead to the same folder, changed ones to another. So
running a recipe again goes on where it stopped, and does nothing when all is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml

from whet.errors import WhetError
from whet.files import refused_when_full, sha256, staged_folder, write_text
from whet.recipe import Recipe

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


class Run:
    """One run's folder, locked for this process until `close`."""

    def __init__(self, folder: Path, recipe: Recipe, lock: IO[str]):
        self.folder, self.recipe, self._lock = folder, recipe, lock

    @classmethod
    def open(cls, recipe: Recipe, base: Path, root: Path, data: str = "") -> Run:
        """The run of `recipe`, whose paths start at `base`, under `root`: a new folder, or the one it began in.

        data: digest of the version of its data that it learns from.
        """
        inputs = input_digests(recipe, base) | ({"data": data} if data else {})
        digest = hashlib.sha256(json.dumps([recipe.digest(), inputs], sort_keys=True).encode()).hexdigest()
        folder = root / f"{recipe.name}-{digest[:10]}"
        with refused_when_full(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")  # noqa: SIM115 (held until close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            fix = "wait for it to end, or stop it"
            raise WhetError("another process is at work on this run", where=str(folder), fix=fix) from None
        run = cls(folder, recipe, lock)
        try:
            run._begin(base, inputs)
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, base: Path, inputs: dict[str, str]) -> None:
        """Write what the folder lacks: the recipe and the facts on a first call."""
        self._drop_torn_line()
        if not (self.folder / "run.json").exists():
            write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))
            facts = {"inputs": inputs, "seed": self.recipe.seed, **environment(base)}
            write_text(self.folder / "run.json", json.dumps(facts, indent=2) + "\n")

    def close(self) -> None:
        self._lock.close()

    def stage(self, name: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of a stage, built by `build(folder)` unless it is there already; and whether it was built now."""
        final = self.folder / name
        if final.is_dir():
            return final, False
        with staged_folder(final) as staged:
            build(staged)
        return final, True

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        with refused_when_full(self.folder), open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of one stage or all."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if stage in (None, line.get("stage"))]

    def _drop_torn_line(self) -> None:
        """A crash may leave the beginning of a last line in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        if path.exists() and not (text := path.read_text(encoding="utf-8", errors="replace")).endswith("\n"):
            write_text(path, text[: text.rfind("\n") + 1])

    def forget_after(self, step: int) -> None:
        """Drop training metrics past `step`: training goes on from there and will write them again."""
        kept = [line for line in self.metrics() if line.get("stage") != "train" or line["step"] <= step]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def input_digests(recipe: Recipe, base: Path) -> dict[str, str]:
    """Hex digest of every data file a recipe reads, by path relative to the recipe, and of a local base model."""
    digests = {}
    for source in [*recipe.data.sources, *recipe.data.eval_sources]:
        for path in source.files(base):
            digests[os.path.relpath(path, base)] = sha256(path)
    model = Path(recipe.model.base).expanduser()
    if model.is_dir():
        files = sorted(p for p in model.iterdir() if p.is_file())
        stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        digests[recipe.model.base] = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    return digests


def environment(base: Path) -> dict[str, Any]:
    """Versions, hardware and git state: what one needs to know to repeat a run."""
    import torch

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "versions": versions,
        "hardware": hardware,
        "git": _git_state(base),
    }


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the recipe's repository and whether it has changes; None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()
