"""What a proof finds: checks, each passed or failed with the number it rests on, and how they are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from whet.files import write_text

NAME = "proof.json"


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    what: what was found, in words. value, limit: the number found and the one it is held to, where there is one.
    rule: how it is held to it.
    """

    name: str
    passed: bool
    what: str
    value: float | None = None
    limit: float | None = None
    rule: Literal["at most", "at least", "1 within"] = "at most"


@dataclass(frozen=True)
class Proof:
    """An artifact against the adapter on its base.

    artifact: its path in the export's folder. format: q4_k_m, bf16, .... engine: what loaded it, with its version.
    measures: numbers that nothing is held to, by what they are. Neither holds text of a prompt or an answer.
    """

    artifact: str
    format: str
    engine: str
    checks: tuple[Check, ...]
    measures: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check passed. A proof without checks proves nothing."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


def save(proofs: list[Proof], folder: Path) -> None:
    """Write `folder/proof.json`: every proof with its checks."""
    kept = [{"passed": proof.passed, **asdict(proof)} for proof in proofs]
    for line in kept:
        line["measures"] = {name: _finite(value) for name, value in line["measures"].items()}
        for check in line["checks"]:
            check["value"] = _finite(check["value"])
    write_text(folder / NAME, json.dumps({"proofs": kept}, indent=1, allow_nan=False) + "\n")


def _finite(value: float | None) -> float | None:
    """JSON has neither infinity nor what is no number."""
    return value if value is not None and math.isfinite(value) else None


def read(folder: Path) -> list[dict[str, Any]]:
    """What `save` wrote."""
    kept: list[dict[str, Any]] = json.loads((folder / NAME).read_text(encoding="utf-8"))["proofs"]
    return kept
