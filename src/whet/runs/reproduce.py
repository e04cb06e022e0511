"""Run a finished run again, in a folder of its own, and compare the weights bit by bit.

On a CPU the same recipe, inputs, versions and processor give the same bits. So what differs is looked for first, and
named, before hours are spent; after that, a difference in the weights is a fault. On a GPU some sums have no fixed
order, and the weights may differ without one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from whet.errors import WhetError
from whet.files import refused_when_full, sha256
from whet.recipe import Export, Recipe, Track
from whet.runs import folders, ledger
from whet.runs.environment import Difference, differences
from whet.runs.ledger import Ledger
from whet.runs.receipts import changes, read_receipts
from whet.runs.signing import key_in_use
from whet.runs.store import RESUMED, Run, input_digests

TRAINED = "trained"
RunRecipe = Callable[[Recipe, Path, Path], Run]
"""Does all that a recipe says: (recipe, the folder its paths start at, the folder of the runs) -> the run."""


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    same:       whether every weight file has the same bytes.
    same_data:  whether the data was prepared to the same version.
    tensors:    name -> largest absolute difference, of the tensors that differ; empty when `same`.
    first_step: the first optimizer step whose loss differs; None where none does.
    folder:     the second run, kept when it differs; None when it was removed.
    """

    run: str
    same: bool
    same_data: bool
    tensors: Mapping[str, float]
    first_step: int | None
    folder: Path | None


def unlike(folder: Path, base: Path | None = None) -> list[Difference]:
    """What of inputs, versions and hardware is not as it was when the run in `folder` began.

    base: where the recipe's paths start; default: where they did then. Raises WhetError where the run is damaged.
    """
    facts = folders.facts(folder)
    place = base_of(facts, folder, base)
    then = {name: digest for name, digest in facts.get("inputs", {}).items() if name != "data"}
    now = input_digests(stored_recipe(folder), place)
    names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    inputs = [Difference("input", name, _short(then.get(name)), _short(now.get(name))) for name in names]
    return inputs + differences(facts)


def reproduce(
    folder: Path, root: Path, run_recipe: RunRecipe, *, base: Path | None = None, anyway: bool = False
) -> Reproduction:
    """Run the recipe of the run in `folder` again, under a fresh folder in `root`, and compare the weights.

    anyway: also where versions or hardware differ; never where inputs do.
    Raises WhetError, before anything runs, that names what differs or is damaged.
    """
    recipe, weights = stored_recipe(folder), _weights(folder)
    _check_whole(folder)
    found = unlike(folder, base)
    _refuse(folder, found, _resumptions(folder), anyway)
    place = base_of(folders.facts(folder), folder, base)
    to = Ledger(root / ledger.NAME, key_in_use())
    with to.stage("reproduce", run=folder.name, inputs=weights) as told:
        with refused_when_full(root):
            fresh = Path(tempfile.mkdtemp(prefix=".reproduce-", dir=root))
        try:
            again = run_recipe(_weights_alone(recipe), place, fresh).folder
            result = _compare(folder, weights, again)
        except BaseException:
            shutil.rmtree(fresh)
            raise
        if result.same:
            shutil.rmtree(fresh)
        told.outputs.update(_weights(again) if not result.same else weights)
        told.facts.update(same=result.same, first_step=result.first_step, unlike=[str(one) for one in found])
    return result


def stored_recipe(folder: Path) -> Recipe:
    """The recipe as the run resolved it. Raises WhetError where it is missing, damaged, or of another version."""
    values = folders.recipe_values(folder)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"this version of whet does not take it: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise WhetError(what, where=str(folder / "recipe.yaml"), fix="use the version in its run.json") from None


def _weights_alone(recipe: Recipe) -> Recipe:
    """The recipe without what comes after the weights: a gate, whose baseline lies elsewhere, exports, trackers."""
    evaluation = recipe.eval.model_copy(update={"gate": None}) if recipe.eval else None
    return recipe.model_copy(update={"eval": evaluation, "export": Export(), "track": Track()})


def base_of(facts: Mapping[str, Any], folder: Path, base: Path | None) -> Path:
    """The folder at which a recipe's paths start. Raises WhetError when it is not there."""
    place = base or Path(str(facts.get("base", "")))
    if not facts.get("base") and base is None:
        raise WhetError("run.json does not say where its data lay", where=str(folder), fix="give --base FOLDER")
    if not place.is_dir():
        raise WhetError("the folder of its data is gone", where=str(place), fix="give --base FOLDER")
    return place


def _weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the run's files of weights, by name. Raises WhetError where there are none."""
    found = {path.name: sha256(path) for path in sorted((folder / TRAINED).glob("*.safetensors"))}
    if not found:
        raise WhetError("the run has no trained weights", where=str(folder), fix="whet run its recipe to the end first")
    return found


def _check_whole(folder: Path) -> None:
    """Raises WhetError where the weights are not the ones that training left."""
    receipt = read_receipts(folder).get(TRAINED)
    if receipt is None:
        raise WhetError("the receipt of its training is missing", where=str(folder), fix="whet runs verify")
    if found := changes(folder / TRAINED, receipt.files):
        where, what = found[0]
        raise WhetError(what, where=where, fix="whet runs verify")


def _resumptions(folder: Path) -> list[str]:
    """What differed when the run was gone on with: then no one environment made it."""
    told = ledger.events(folder.parent / ledger.NAME)
    lists = [event.facts.get("unlike") for event in told if event.what == RESUMED and event.run == folder.name]
    return [f"on resuming it, {one}" for found in lists if isinstance(found, list) for one in found]


def _refuse(folder: Path, found: list[Difference], resumptions: list[str], anyway: bool) -> None:
    inputs = [str(one) for one in found if one.kind == "input"]
    lines = inputs or [*map(str, found), *resumptions]
    if inputs or (lines and not anyway):
        fix = "put the inputs back" if inputs else "install these versions on such a machine, or give --anyway"
        what = "it cannot be reproduced here, since these differ:"
        raise WhetError("\n  ".join([what, *lines]), where=str(folder), fix=fix)


def _compare(folder: Path, weights: Mapping[str, str], again: Path) -> Reproduction:
    same = _weights(again) == weights
    data = [folders.facts(run).get("inputs", {}).get("data") for run in (folder, again)]
    return Reproduction(
        run=folder.name,
        same=same,
        same_data=data[0] == data[1],
        tensors={} if same else _tensors(folder / TRAINED, again / TRAINED),
        first_step=_first_step(folder, again),
        folder=None if same else again,
    )


def _tensors(one: Path, other: Path) -> dict[str, float]:
    """Largest absolute difference of each tensor that differs; infinite where one side lacks it or has other sizes."""
    from safetensors.torch import load_file

    left, right = (
        {k: v for p in sorted(f.glob("*.safetensors")) for k, v in load_file(p).items()} for f in (one, other)
    )
    found = {}
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found[name] = float("inf")
        elif not a.equal(b):
            found[name] = float((a.double() - b.double()).abs().max())
    return found


def _first_step(one: Path, other: Path) -> int | None:
    left, right = (
        {m["step"]: m.get("loss") for m in folders.metrics(f) if m.get("stage") == "train"} for f in (one, other)
    )
    unequal = [step for step in left.keys() | right.keys() if left.get(step) != right.get(step)]
    return min(unequal, default=None)


def _short(digest: str | None) -> str | None:
    return digest[:12] if digest else None
