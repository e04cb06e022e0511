"""Make room: remove checkpoints that nothing needs any more, and old runs, by rules that are said beforehand.

A run that another run's gate has as its baseline is never removed, nor one that a process is at work on. Each removal
is told to the ledger first; when that cannot be, nothing is removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.runs import folders, ledger
from whet.runs.audit import PRUNED, runs_told
from whet.runs.browse import LAST, size_of
from whet.runs.ledger import Ledger

CHECKPOINTS = "checkpoints"
REMOVED = ".removed-"
"""Beginning of a folder's name while it is being removed; what a crash left of it goes with the next removal."""


@dataclass(frozen=True)
class Rules:
    """What to remove.

    runs:        these, by id; of one whose folder is gone, the ledger is told.
    older_than:  runs that nothing was written to for so many days.
    keep:        of these, not the latest so many of each recipe's name.
    unfinished:  of these, also runs that stopped on the way and could go on.
    checkpoints: the checkpoints of runs that are finished.
    """

    runs: tuple[str, ...] = ()
    older_than: float | None = None
    keep: int = 1
    unfinished: bool = False
    checkpoints: bool = False


@dataclass(frozen=True)
class Item:
    """A folder to remove, its bytes, and the rule that says so; or, with `kept`, the reason why it stays."""

    folder: Path
    size: int
    rule: str
    kept: str | None = None


def plan(root: Path, rules: Rules) -> list[Item]:
    """What the rules would remove under `root`, and what they name but must stay.

    Raises WhetError without a rule, for a run that is not there, and when a run's recipe cannot be read: what it has
    as its baseline is not known then.
    """
    if not (rules.runs or rules.older_than is not None or rules.checkpoints):
        fix = "give --checkpoints, --older-than DAYS, or names of runs"
        raise WhetError("nothing says what to remove", where="whet runs prune", fix=fix)
    found = folders.run_folders(root)
    gone = [name for name in rules.runs if _is_gone(root, name)]
    wanted = {_within(root, name): "named" for name in rules.runs if name not in gone}
    if rules.older_than is not None:
        wanted = _old(found, rules, rules.older_than) | wanted
    used = baselines(root, found) if wanted else {}
    items = [Item(folder, size_of(folder), rule, _held(folder, used)) for folder, rule in wanted.items()]
    items += [Item(root / name, 0, "gone already, which the ledger is to tell") for name in gone]
    if rules.checkpoints:
        items += [_checkpoints(folder) for folder in found if (folder / CHECKPOINTS).is_dir() and folder not in wanted]
    return items


def remove(root: Path, items: Iterable[Item], to: Ledger) -> int:
    """Remove what the plan says, and return its bytes. Raises WhetError when the ledger cannot be written."""
    _finish(root)
    freed = 0
    for item in items:
        run = item.folder.parent if item.folder.name == CHECKPOINTS else item.folder
        with folders.lock(run) as free:
            if item.kept is None and free:
                what = "checkpoints.pruned" if item.folder.name == CHECKPOINTS else PRUNED
                to.append(what, run=run.name, facts={"bytes": item.size, "rule": item.rule})
                if item.folder.exists():
                    removed = root / f"{REMOVED}{run.name}-{os.getpid()}"
                    item.folder.rename(removed)
                    shutil.rmtree(removed)
                freed += item.size
    return freed


def baselines(root: Path, found: Iterable[Path]) -> dict[Path, str]:
    """The runs that others have as the baseline of their gate, each with one that does. Raises WhetError."""
    references = [(folder.name, _baseline(folders.recipe_values(folder))) for folder in found]
    for event in ledger.events(root / ledger.NAME):
        references.append((event.run, event.facts.get("baseline")))
        references += [(event.run, name) for name in event.inputs if "baseline" in name]
    used = {}
    for run, reference in references:
        for folder in found:
            if run != folder.name and isinstance(reference, str) and _means(reference, folder):
                used[folder] = run
    return used


def _baseline(recipe: dict[str, Any]) -> Any:
    section: Any = recipe
    for key in ("eval", "gate", "baseline"):
        section = section.get(key) if isinstance(section, dict) else None
    return section


def _means(reference: str, folder: Path) -> bool:
    """Whether a baseline's name means this run: its id, the beginning of it, or a path to it or into it."""
    return bool(reference) and (folder.name.startswith(reference) or folder.name in Path(reference).parts)


def _within(root: Path, name: str) -> Path:
    """The run that `name` means, if it lies under `root`, whose ledger is to tell of its end. Raises WhetError."""
    folder = folders.find(root, name)
    if folder.resolve().parent != root.resolve():
        raise WhetError("this run lies elsewhere", where=str(folder), fix=f"give --runs {folder.parent}")
    return root / folder.resolve().name


def _is_gone(root: Path, name: str) -> bool:
    """Whether the ledger tells of a run of this id whose folder someone removed without a word."""
    path = root / ledger.NAME
    if not path.exists() or (root / name).exists():
        return False
    told = runs_told(path).get(name)
    return told is not None and bool(told.made)


def _old(found: Iterable[Path], rules: Rules, days: float) -> dict[Path, str]:
    by_name: dict[str, list[Path]] = {}
    for folder in sorted(found, key=touched, reverse=True):
        by_name.setdefault(folder.name.rpartition("-")[0], []).append(folder)
    past_keep = [folder for same in by_name.values() for folder in same[rules.keep :]]
    limit = time.time() - days * 86_400
    rule = f"older than {days:g} days"
    return {
        folder: rule
        for folder in past_keep
        if touched(folder) < limit and (rules.unfinished or (folder / LAST).is_dir())
    }


def touched(folder: Path) -> float:
    """When something was last written to the run, in seconds since 1970."""
    own = [folder, *folder.iterdir(), *(folder / CHECKPOINTS).glob("*")]
    return max(path.lstat().st_mtime for path in own if path.name != ".lock")


def _held(folder: Path, used: dict[Path, str]) -> str | None:
    if folder in used:
        return f"{used[folder]} has it as its baseline"
    return "a process is at work on it" if folders.at_work(folder) else None


def _checkpoints(run: Path) -> Item:
    kept = None if (run / LAST).is_dir() else "the run is not finished and may go on from them"
    folder = run / CHECKPOINTS
    return Item(folder, size_of(folder), "checkpoints of a finished run", kept or _held(run, {}))


def _finish(root: Path) -> None:
    """Remove what an earlier removal that was stopped left."""
    for folder in root.glob(f"{REMOVED}*"):
        shutil.rmtree(folder)
