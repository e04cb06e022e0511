"""Runs a recipe in processes that start at once, so that they can be killed by the dozen.

A process that has its libraries loaded forks another for every line it reads, and answers with that one's number; it
answers with the exit status when that one has ended.

    python -m tests.forked FOLDER       runs FOLDER/recipe.yaml
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path


class Forked:
    """The recipe in `folder`, run again and again."""

    def __init__(self, folder: Path):
        command = [sys.executable, "-m", "tests.forked", str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        root = Path(__file__).parents[1]
        self._parent = subprocess.Popen(
            command, cwd=root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(self) -> int:
        """The number of the process that runs the recipe."""
        assert self._parent.stdin
        self._parent.stdin.write("run\n")
        self._parent.stdin.flush()
        return self._answer()

    def end(self) -> int:
        """Waits for it. Its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(self._answer())

    def close(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait(60)

    def _answer(self) -> int:
        assert self._parent.stdout
        return int(self._parent.stdout.readline())


def main(folder: Path) -> None:
    import faulthandler

    import torch
    from rich.console import Console
    from tqdm import tqdm

    from whet.pipeline import run_recipe
    from whet.recipe import load

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by all that are forked: one killed with it would stop the rest
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    recipe = load(folder / "recipe.yaml")
    run_recipe(recipe.model_copy(update={"name": "loading"}), folder, folder / "loading", Console(quiet=True))
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            faulthandler.dump_traceback_later(120, exit=True)
            try:
                run_recipe(recipe, folder, folder / "runs", Console(quiet=True))
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        print(child, file=answers, flush=True)
        print(os.waitpid(child, 0)[1], file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
