"""A run and its folder: what was asked for, what it ran on, what came out.

    runs/ledger.jsonl  what was done to any run, in order (ledger.py)
    runs/NAME-DIGEST/
      recipe.yaml      the resolved recipe, defaults included
      run.json         digests of the inputs, versions, hardware, git state, the plan against what was measured
      metrics.jsonl    one JSON object a line
      checkpoints/     while training, and the last two after it
      STAGE/           what a stage made: there whole, or not at all
      receipts/        SHA-256 of every file that a stage made

The digest covers the recipe and its input files: the same inputs lead to the same folder, changed ones to another. So
running a recipe again goes on where it stopped, and does nothing when all is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from whet.errors import WhetError
from whet.files import refused_when_full, sha256, staged_folder, write_text
from whet.recipe import Recipe
from whet.runs import folders
from whet.runs.environment import differences, environment
from whet.runs.ledger import NAME, Ledger
from whet.runs.receipts import RUN, Receipt, digests, keep, read_receipts
from whet.runs.signing import key_in_use

RESUMED = "run.resumed"


class Run:
    """One run's folder, locked for this process until `close`, and the ledger of all runs beside it."""

    def __init__(self, folder: Path, recipe: Recipe, lock: IO[str]):
        self.folder, self.recipe, self._lock = folder, recipe, lock
        self.ledger = Ledger(folder.parent / NAME, key_in_use())
        self.followers: list[Callable[[Mapping[str, Any]], None]] = []
        self._resumed = False

    @property
    def id(self) -> str:
        return self.folder.name

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
        if not _claim(lock):
            lock.close()
            fix = "wait for it to end, or stop it"
            raise WhetError("another process is at work on this run", where=str(folder), fix=fix)
        try:
            run = cls(folder, recipe, lock)
            run._begin(base, inputs)
        except BaseException:
            lock.close()
            raise
        return run

    def _begin(self, base: Path, inputs: dict[str, str]) -> None:
        """Write what the folder lacks: the recipe and the facts on a first call, and the event that tells of them."""
        self._drop_torn_line()
        self._resumed = (self.folder / "run.json").exists()
        if not self._resumed:
            write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe.model_dump(), sort_keys=False))
            seed = self.recipe.seed
            seeds = {"training": seed, "data": seed, "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED")}
            self._write_facts({"inputs": inputs, "seed": seed, "seeds": seeds, **environment(base)})
        if RUN not in read_receipts(self.folder):
            self._tell("run.opened", inputs)

    def record(self, name: str, value: Any) -> None:
        """Add a fact to run.json, or replace it, and tell the ledger."""
        self._write_facts(self.facts() | {name: value})
        self._tell("run.recorded", {})

    def facts(self) -> dict[str, Any]:
        """What run.json holds. Raises WhetError when it is damaged."""
        return folders.facts(self.folder)

    def _write_facts(self, facts: dict[str, Any]) -> None:
        write_text(self.folder / "run.json", json.dumps(facts, indent=2) + "\n")

    def _tell(self, what: str, inputs: dict[str, str]) -> None:
        """An event, and the receipt, for the files in the run's folder itself."""
        outputs = {name: sha256(self.folder / name) for name in ("recipe.yaml", "run.json")}
        with refused_when_full(self.folder):
            event = self.ledger.append(what, run=self.id, inputs=inputs, outputs=outputs)
            keep(self.folder, RUN, Receipt.of(event))

    def close(self) -> None:
        self._lock.close()

    def stage(self, name: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of a stage, built by `build(folder)` unless it is there already; and whether it was built now.

        The ledger tells when it began and what it made. Raises WhetError, with nothing built, when it cannot.
        """
        final = self.folder / name
        if final.is_dir():
            return final, False
        self._tell_resumption()
        made_from = {stage: receipt.hash for stage, receipt in read_receipts(self.folder).items() if stage != name}
        with staged_folder(final) as staged:
            with self.ledger.stage(name, run=self.id, inputs=made_from, facts={"folder": name}) as stage:
                build(staged)
                stage.outputs.update(digests(staged))
                stage.facts["metrics"] = self._metrics_digest()
            assert stage.done is not None
            keep(self.folder, name, Receipt.of(stage.done))
        return final, True

    def _tell_resumption(self) -> None:
        """An event where a run goes on with other versions or hardware than run.json tells of."""
        if self._resumed and (found := differences(self.facts())):
            self.ledger.append(RESUMED, run=self.id, facts={"unlike": [str(one) for one in found]})
        self._resumed = False

    def _metrics_digest(self) -> dict[str, Any]:
        """Bytes of metrics.jsonl, to which lines may be added, and the SHA-256 of what it holds now."""
        path = self.folder / "metrics.jsonl"
        content = path.read_bytes() if path.exists() else b""
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl, and tell the followers."""
        line = {"time": round(time.time(), 3), **values}
        with refused_when_full(self.folder), open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for follow in self.followers:
            follow(line)

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
        """Drop lines of steps past `step`: training goes on from there and will write them again."""
        kept = [line for line in self.metrics() if line.get("step", 0) <= step]
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def _claim(lock: IO[str]) -> bool:
    """Whether the run is this process's now. Who lists runs holds a lock for a moment, so one refusal is not enough."""
    for _ in range(5):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


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
