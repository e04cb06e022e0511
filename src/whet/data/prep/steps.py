"""What is done with records before they are tokenized: `data` of a recipe, as plain values that processes share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from whet.data.clean import Clean
from whet.data.formats import Source
from whet.data.redact.regions import REGIONS

Gate = Literal["refuse", "drop", "warn"]


@dataclass(frozen=True)
class Redaction:
    """policy, classes: its name, and class -> mode. key: of pseudonyms and vault. ner: a local model's folder.

    vault: keep the originals, encrypted. regions: as in a policy.
    """

    policy: str
    classes: Mapping[str, str]
    key: bytes | None = field(default=None, repr=False)
    ner: str | None = None
    vault: bool = False
    regions: tuple[str, ...] = REGIONS


@dataclass(frozen=True)
class Dedup:
    """exact: rows of equal content. near: estimated Jaccard similarity from which rows count as one; None: none do."""

    exact: bool = True
    near: float | None = 0.85


@dataclass(frozen=True)
class Split:
    """share: of the rows, held out by a keyed hash of `group_by`, or of the row. stratify_by: the share is met within
    each value of that column. time, at: the column of a row's time, and from when on rows are held out."""

    share: float = 0.1
    group_by: str | None = None
    stratify_by: str | None = None
    time: str | None = None
    at: str | None = None

    @property
    def how(self) -> str:
        if self.time:
            return f"{self.time} from {self.at} on"
        keyed = f"keyed hash of {self.group_by or 'the row'}"
        return f"{keyed}, within each {self.stratify_by}" if self.stratify_by else keyed


@dataclass(frozen=True)
class Leaks:
    """What is done with training rows that hold evaluation text. tasks: files of evaluation tasks, held out besides."""

    gate: Gate = "refuse"
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steps:
    """sources, eval_sources: what to read; with eval_sources nothing is split off. bad_rows: the share of rows that may
    be unreadable. None leaves a step out."""

    sources: tuple[Source, ...]
    eval_sources: tuple[Source, ...] = ()
    bad_rows: float = 0.0
    clean: Clean | None = field(default_factory=Clean)
    redact: Redaction | None = None
    dedup: Dedup | None = field(default_factory=Dedup)
    split: Split = field(default_factory=Split)
    leaks: Leaks | None = field(default_factory=Leaks)
    seed: int = 0

    def digest(self) -> str:
        """Of all that decides what comes out; the order of sources does not, and of a key only its fingerprint."""
        values = asdict(self)
        for name in ("sources", "eval_sources"):
            for source in values[name]:
                if isinstance(source["origin"], dict):
                    source["origin"]["url"] = None  # holds a password
            values[name] = sorted(values[name], key=lambda source: json.dumps(source, sort_keys=True, default=_plain))
        if self.redact:
            values["redact"]["key"] = fingerprint(self.redact.key)
        return digest_of(values)


def fingerprint(key: bytes | None) -> str | None:
    """What tells keys apart and gives nothing of them away."""
    return None if key is None else hashlib.blake2b(key, digest_size=8, person=b"whet-key").hexdigest()


def digest_of(values: Any) -> str:
    """Hex SHA-256 of JSON values."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence | set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no digest")
