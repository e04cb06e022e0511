"""`whet exec script.py`: run a script that was written for unsloth, and for older TRL and transformers, unchanged.

For the time of the script, and in this process only, `sys.modules` holds whet under the name `unsloth`, and adapters
under the names `trl` and `transformers` that answer the names below with whet's subclasses.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import transformers
import trl

from whet.compat.adapter import Adapter
from whet.compat.unsloth_names import unsloth_modules
from whet.errors import WhetError
from whet.train import trainers
from whet.train.arguments import TrainingArguments

TRL_NAMES = {
    name: getattr(trainers, name)
    for method in ("SFT", "DPO", "KTO", "ORPO", "GRPO", "Reward")
    for name in (f"{method}Trainer", f"{method}Config")
}


def run_script(path: str | Path, argv: Sequence[str] = ()) -> None:
    """Run the script at `path` as the main program, with `argv` as its arguments.

    Prints to stderr what was adapted. What the script raises, SystemExit included, passes through; `sys.modules`,
    `sys.argv` and `sys.path` are afterwards as before. Raises WhetError where there is no such script.
    """
    script = Path(path)
    if not script.is_file():
        raise WhetError("there is no script here", where=str(path), fix="whet exec script.py ARGUMENTS...")
    adapted = ", ".join(["transformers.TrainingArguments", *(f"trl.{name}" for name in TRL_NAMES)])
    print(f"whet exec: for {script.name}, unsloth is whet, and so are {adapted}", file=sys.stderr)
    modules = {
        **unsloth_modules(),
        "transformers": Adapter(transformers, {"TrainingArguments": TrainingArguments}),
        "trl": Adapter(trl, TRL_NAMES),
    }
    with _standing_in(modules), _main_program(script, argv):
        runpy.run_path(str(script), run_name="__main__")


@contextmanager
def _standing_in(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


@contextmanager
def _main_program(script: Path, argv: Sequence[str]) -> Iterator[None]:
    """The arguments and the import path that the interpreter gives a script."""
    before = sys.argv, list(sys.path)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before
