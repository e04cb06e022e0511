"""Runs a recipe in processes that start at once, so that they can be killed by the dozen.

A process that has run the recipe once forks another each time it is asked, and answers with that one's number; it
answers with the exit status when that one has ended.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from tests.warm import CONTEXT, Warm


class Forked:
    """The recipe in `folder`, run again and again."""

    def __init__(self, folder: Path):
        self._asked, theirs = CONTEXT.Pipe()
        self._parent = Warm(fork_when_asked, folder, theirs, cwd=folder)
        theirs.close()

    def start(self) -> int:
        """The number of the process that runs the recipe."""
        self._asked.send("run")
        return self._answer()

    def end(self) -> int:
        """Waits for it. Its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(self._answer())

    def close(self) -> None:
        self._asked.close()
        self._parent.communicate(60)

    def _answer(self) -> int:
        return int(self._asked.recv())


def fork_when_asked(folder: str, asked: Connection) -> None:
    import faulthandler

    from rich.console import Console
    from tqdm import tqdm

    from whet.pipeline import run_recipe
    from whet.recipe import load

    tqdm.set_lock(threading.RLock())  # its own is shared by all that are forked: one killed with it would stop the rest
    base = Path(folder)
    recipe = load(base / "recipe.yaml")
    run_recipe(recipe.model_copy(update={"name": "loading"}), base, base / "loading", Console(quiet=True))
    while True:
        try:
            asked.recv()
        except EOFError:
            return
        child = os.fork()
        if not child:
            faulthandler.dump_traceback_later(120, exit=True)
            try:
                run_recipe(recipe, base, base / "runs", Console(quiet=True))
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        asked.send(child)
        asked.send(os.waitpid(child, 0)[1])
