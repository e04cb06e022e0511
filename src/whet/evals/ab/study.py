"""A study: what is compared, and the secret that says in which order and on which side each grader sees it.

    FOLDER/study.json    systems, items and their answers, the question put; written once
    FOLDER/secret.key    32 random bytes in hex, readable by its owner alone
    FOLDER/votes.jsonl   `votes`

Order and sides come from keyed hashes: r(purpose, grader, comparison) = HMAC-SHA256(secret, purpose, grader,
comparison). A grader sees the comparisons by rising r("order"). Those of one pair of systems are ranked by r("side")
and the lower half is seen the other way round, so that a grader who favours a side favours no system. Without the
secret r cannot be told from chance. study.json holds the secret's SHA-256, so that nobody can later use another one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.evals.ab.answers import Item, System, pair
from whet.files import refused_when_full, write_text

QUESTION = "Which answer is better?"
TITLE = "Comparing answers"
VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Two systems' answers to one item. first, second: numbers of the systems, first < second."""

    item: int
    first: int
    second: int


@dataclass(frozen=True)
class Seat:
    """One comparison as one grader sees it. left, right: numbers of the systems."""

    key: str
    item: Item
    left: int
    right: int


@dataclass(frozen=True)
class Study:
    """id: random, tells studies apart. systems: names. secret: 32 bytes."""

    id: str
    created: str
    title: str
    question: str
    show_reference: bool
    systems: tuple[str, ...]
    items: tuple[Item, ...]
    secret: bytes

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of any two systems, the lower first."""
        return list(combinations(range(len(self.systems)), 2))

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Key -> comparison, of all pairs of systems whose answers differ."""
        return {
            f"{item.id}/{first}-{second}": Comparison(i, first, second)
            for i, item in enumerate(self.items)
            for first, second in self.pairs
            if item.answers[first] != item.answers[second]
        }

    def identical(self, first: int, second: int) -> int:
        """Items to which both systems gave the same answer: they count as ties, and nobody is asked."""
        return sum(item.answers[first] == item.answers[second] for item in self.items)

    def seats(self, grader: str) -> tuple[Seat, ...]:
        """What this grader sees, in order. Position p on the page is the seat p - 1. Two hashes a comparison."""
        swapped = {key for pair in self.pairs for key in _swapped(self, grader, pair)}
        return tuple(
            _seat(self, key, key in swapped)
            for key in sorted(self.comparisons, key=lambda key: self.rank("order", grader, key))
        )

    def rank(self, purpose: str, *words: str) -> bytes:
        """The keyed hash of the module's docstring."""
        return hmac.digest(self.secret, json.dumps([purpose, *words]).encode(), "sha256")

    @property
    def commitment(self) -> str:
        """SHA-256 of the secret in hex: it says nothing of the secret, and that it was not exchanged."""
        return hashlib.sha256(self.secret).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 in hex of all that the votes rest on."""
        return hashlib.sha256(json.dumps(_to_json(self), sort_keys=True).encode()).hexdigest()


def _seat(study: Study, key: str, swapped: bool) -> Seat:
    comparison = study.comparisons[key]
    sides = (comparison.first, comparison.second)
    left, right = reversed(sides) if swapped else sides
    return Seat(key, study.items[comparison.item], left, right)


def _swapped(study: Study, grader: str, pair: tuple[int, int]) -> list[str]:
    """Half of the pair's comparisons, by lot; of an odd number the lot too says to which half the last one goes."""
    keys = [key for key, comparison in study.comparisons.items() if (comparison.first, comparison.second) == pair]
    keys.sort(key=lambda key: study.rank("side", grader, key))
    lot = study.rank("odd", grader, *map(str, pair))[0] & 1
    return keys[: (len(keys) + lot) // 2]


# ---------------------------------------------------------------- the folder


def create(
    folder: Path,
    systems: Sequence[System],
    *,
    title: str = TITLE,
    question: str = QUESTION,
    show_reference: bool = False,
    shared: bool = False,
    sample: int | None = None,
) -> Study:
    """Write a new study. sample: take this many items by lot. Raises WhetError when `folder` holds a study already."""
    items = pair(systems, shared=shared)
    secret = secrets.token_bytes(32)
    if sample is not None:
        items = _sampled(items, sample)
    study = Study(
        id=secrets.token_hex(8),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        title=title,
        question=question,
        show_reference=show_reference,
        systems=tuple(system.name for system in systems),
        items=tuple(items),
        secret=secret,
    )
    if not study.comparisons:
        raise WhetError("all answers are the same", where=str(folder), fix="there is nothing to compare")
    with refused_when_full(folder):
        if (folder / "study.json").exists():
            raise WhetError("a study is here already", where=str(folder), fix="name another folder")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_secret(folder / "secret.key", secret)
        write_text(folder / "study.json", json.dumps(_to_json(study), indent=1) + "\n")  # last: it makes the study
        os.chmod(folder / "study.json", 0o600)
    return study


def load(folder: Path) -> Study:
    """Read a study. Raises WhetError when a part is missing, damaged, or does not belong to the rest."""
    path = folder / "study.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        secret = bytes.fromhex((folder / "secret.key").read_text(encoding="ascii").strip())
        study = _from_json(value, secret)
    except FileNotFoundError as error:
        fix = "make one: whet ab new FOLDER FILE FILE"
        raise WhetError("no study in this folder", where=str(error.filename), fix=fix) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WhetError(f"the study cannot be read: {error}", where=str(folder), fix="bring back a copy") from error
    if study.commitment != value.get("commitment"):
        fix = "bring back the study's own secret.key"
        raise WhetError("the secret is not the one the study was made with", where=str(folder), fix=fix)
    return study


def _sampled(items: list[Item], count: int) -> list[Item]:
    if not 0 < count <= len(items):
        raise WhetError(f"cannot take {count} of {len(items)} items", where="--sample", fix=f"give 1 to {len(items)}")
    chosen = set(secrets.SystemRandom().sample(range(len(items)), count))
    return [item for i, item in enumerate(items) if i in chosen]


def _write_secret(path: Path, secret: bytes) -> None:
    path.unlink(missing_ok=True)  # of a study whose making was cut off
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secret.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())


def _to_json(study: Study) -> dict[str, Any]:
    fields = {name: getattr(study, name) for name in ("id", "created", "title", "question", "show_reference")}
    fields |= {"systems": list(study.systems), "items": [asdict(item) for item in study.items]}
    return {"version": VERSION, "commitment": study.commitment, **fields}


def _from_json(value: dict[str, Any], secret: bytes) -> Study:
    if value["version"] != VERSION:
        raise ValueError(f"it is of version {value['version']!r}, and this whet reads {VERSION}")
    systems = tuple(value["systems"])
    items = tuple(
        Item(item["id"], item["prompt"], item["reference"], tuple(item["answers"])) for item in value["items"]
    )
    if any(len(item.answers) != len(systems) for item in items):
        raise ValueError("an item lacks an answer")
    texts = [text for item in items for text in (item.id, item.prompt, *item.answers)]
    if not all(isinstance(text, str) for text in (*systems, *texts, *(value[name] for name in ("id", "title")))):
        raise ValueError("a text is missing")
    return Study(
        value["id"],
        value["created"],
        value["title"],
        value["question"],
        bool(value["show_reference"]),
        systems,
        items,
        secret,
    )
