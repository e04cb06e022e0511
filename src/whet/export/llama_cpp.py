"""Runs a GGUF file in a real llama.cpp, to prove that an export answers as the model it was made from.

llama.cpp comes as a compiled binary from npm: node-llama-cpp and its package for this platform alone (85 MB), in a
folder of their own. Node runs `llama_cpp.mjs` as a subprocess; nothing here or there opens a socket except `install`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whet.errors import WhetError

VERSION = "3.22.1"
_SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
_BINARIES = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64",
    ("Windows", "AMD64"): "win-x64",
}


@dataclass(frozen=True)
class Generation:
    """A greedy answer. `stopped`: it ended with an end-of-generation token, which is in neither list nor text."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    stopped: bool


@dataclass(frozen=True)
class Reading:
    """A sequence to be read by the model in a file, and the first position whose logits are wanted.

    adapter: a GGUF adapter to put on the model.
    """

    gguf: Path
    tokens: Sequence[int]
    start: int = 0
    adapter: Path | None = None


@dataclass(frozen=True)
class Said:
    """What `ask` gives: the tokens of each text, the logits of each sequence, and the answer to each prompt."""

    tokens: list[list[int]]
    logits: list[NDArray[np.float32]]
    generations: list[Generation]


def default_folder() -> Path:
    """Where the packages live: the environment variable WHET_NODE, else `.node` in the current folder."""
    return Path(os.environ.get("WHET_NODE") or ".node").absolute()


def find(folder: Path | None = None) -> Path | None:
    """The folder, where this version of the packages is installed and node can run them; else None."""
    folder = (folder or default_folder()).absolute()
    modules = folder / "node_modules"
    installed = all(
        _version(modules / package) == VERSION for package in ("node-llama-cpp", f"@node-llama-cpp/{_binary()}")
    )
    return folder if installed and shutil.which("node") else None


def packages() -> Path:
    """The folder that node finds the packages in. Raises WhetError where they are not installed."""
    folder = find()
    if folder is None:
        raise WhetError(
            "llama.cpp is not installed",
            where=str(default_folder()),
            fix="run whet.export.llama_cpp.install(), or set WHET_NODE to the folder it is in",
        )
    return folder / "node_modules"


def environment() -> dict[str, str]:
    """Of a node process that runs them: this one's, and no leave to download."""
    return {**os.environ, "NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true"}


def threads_for(asked: int | None) -> int:
    """As many as were asked for, else one less than there are cores.

    llama.cpp's threads wait for each other by spinning. One that has no core to itself holds up all of them: with a
    thread more than there are cores it is a hundred times slower.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(1, cores - 1)


def install(folder: Path | None = None, *, timeout: float = 600) -> Path:
    """Install llama.cpp into `folder` by npm, unless it is there, and return the folder.

    This downloads from the npm registry. Raises WhetError where node or npm is missing or npm fails.
    """
    folder = (folder or default_folder()).absolute()
    if find(folder):
        return folder
    for program in ("node", "npm"):
        if not shutil.which(program):
            raise WhetError(
                f"{program} is not installed, and llama.cpp comes through it",
                fix="install Node.js 20 or later with npm, then try again",
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="install-", dir=folder) as scratch:
        _npm_install(Path(scratch), timeout)
        _move_into_place(Path(scratch) / "node_modules", folder)
    return folder


def tokenize(gguf: Path, texts: Sequence[str], *, timeout: float = 120) -> list[list[int]]:
    """The token ids llama.cpp gives each text, special tokens parsed, no BOS or EOS added."""
    return tokenize_each([(gguf, texts)], timeout=timeout)[0]


def tokenize_each(readings: Sequence[tuple[Path, Sequence[str]]], *, timeout: float = 120) -> list[list[list[int]]]:
    """`tokenize` for several files, by one process."""
    wanted = [{"gguf": _existing(gguf), "texts": list(texts)} for gguf, texts in readings]
    tokens: list[list[list[int]]] = _run({"tokenize": wanted}, timeout)["tokens"]
    return tokens


def detokenize_each(
    readings: Sequence[tuple[Path, Sequence[Sequence[int]]]], *, timeout: float = 120
) -> list[list[str]]:
    """The texts of token ids by the vocabularies of several files, special tokens written out; by one process."""
    wanted = [{"gguf": _existing(gguf), "tokens": [list(ids) for ids in tokens]} for gguf, tokens in readings]
    texts: list[list[str]] = _run({"detokenize": wanted}, timeout)["texts"]
    return texts


def generate(
    gguf: Path,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int,
    threads: int | None = None,
    timeout: float = 600,
) -> list[Generation]:
    """Greedy answers of llama.cpp, on the CPU.

    prompts: rendered chat texts, special tokens and BOS written out in them, or token ids.
    threads: see `threads_for`. timeout: seconds for all prompts together.
    Raises WhetError where llama.cpp is not installed, fails (its messages are in the error), or runs out of time.
    """
    request = _to_generate(gguf, prompts, max_new_tokens)
    return _generations(_run({**request, "threads": threads}, timeout)) if prompts else []


def logits(
    gguf: Path,
    sequences: Sequence[Sequence[int]],
    *,
    start: Sequence[int] | None = None,
    threads: int | None = None,
    timeout: float = 600,
) -> list[NDArray[np.float32]]:
    """What llama.cpp gives every token of the vocabulary to come next: float32 [tokens - start, vocabulary] a sequence.

    Row i is after tokens 0 to start + i. start: the first row wanted of each sequence, as where its answer begins; 0.
    Otherwise as `read_logits`.
    """
    starts = [0] * len(sequences) if start is None else list(start)
    readings = [Reading(gguf, tokens, first) for tokens, first in zip(sequences, starts, strict=True)]
    return read_logits(readings, threads=threads, timeout=timeout)


def read_logits(
    readings: Sequence[Reading], *, threads: int | None = None, timeout: float = 600
) -> list[NDArray[np.float32]]:
    """The logits of sequences in one file or several, float32 [tokens - start, vocabulary] each, by one process.

    On the CPU, keys and values in float32, no flash attention: nothing is rounded but what the files' types round.
    Meanwhile the rows lie in a temporary file: 4 bytes times the vocabulary a token.
    Raises WhetError where llama.cpp is not installed, fails (its messages are in the error), or runs out of time.
    """
    if not readings:
        return []
    with tempfile.TemporaryDirectory(prefix="whet-") as scratch:
        request = _to_read(readings, Path(scratch))
        return _rows_read(readings, request, _run({**request, "threads": threads}, timeout))


def ask(
    gguf: Path,
    *,
    texts: Sequence[str],
    readings: Sequence[Reading],
    prompts: Sequence[list[int]] = (),
    max_new_tokens: int = 1,
    threads: int | None = None,
    timeout: float = 600,
) -> Said:
    """`tokenize`, `read_logits` and `generate`, each as it is, in that order, by one process. Raises what they do."""
    with tempfile.TemporaryDirectory(prefix="whet-") as scratch:
        request = _to_read(readings, Path(scratch))
        request |= {"tokenize": [{"gguf": _existing(gguf), "texts": list(texts)}], "threads": threads}
        if prompts:
            request |= _to_generate(gguf, prompts, max_new_tokens)
        reply = _run(request, timeout)
        rows = _rows_read(readings, request, reply)
    return Said(reply["tokens"][0], rows, _generations(reply) if prompts else [])


def _to_read(readings: Sequence[Reading], scratch: Path) -> dict[str, Any]:
    """The part of a request that asks for these logits, in a file in `scratch`."""
    for reading in readings:
        if not 0 <= reading.start < len(reading.tokens):
            raise WhetError(
                f"row {reading.start} of {len(reading.tokens)} tokens", where="start", fix="start within the sequence"
            )
    wanted = [
        {
            "gguf": _existing(r.gguf),
            "adapter": r.adapter and _existing(r.adapter),
            "tokens": [int(token) for token in r.tokens],
            "start": r.start,
        }
        for r in readings
    ]
    return {"logits": wanted, "out": str(scratch / "logits")}


def _rows_read(
    readings: Sequence[Reading], request: dict[str, Any], reply: dict[str, Any]
) -> list[NDArray[np.float32]]:
    shapes = [(len(r.tokens) - r.start, size) for r, size in zip(readings, reply["vocabularies"], strict=True)]
    with open(request["out"], "rb") as file:
        return [np.fromfile(file, np.float32, rows * columns).reshape(rows, columns) for rows, columns in shapes]


def _to_generate(gguf: Path, prompts: Sequence[str] | Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
    """The part of a request that asks for answers."""
    if max_new_tokens < 1:
        raise WhetError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", fix="ask for 1 token or more")
    if any(len(prompt) == 0 for prompt in prompts):
        raise WhetError("a prompt is empty", where="prompts", fix="give each prompt at least one token")
    return {"gguf": _existing(gguf), "generate": list(prompts), "maxNewTokens": max_new_tokens}


def _generations(reply: dict[str, Any]) -> list[Generation]:
    return [Generation(g["promptTokenIds"], g["tokenIds"], g["text"], g["stopped"]) for g in reply["generations"]]


def log_probabilities(
    gguf: Path,
    sequences: Sequence[Sequence[int]],
    *,
    start: Sequence[int] | None = None,
    threads: int | None = None,
    timeout: float = 600,
) -> list[NDArray[np.float32]]:
    """The natural logarithm of the probability of every next token, as `logits` gives them."""
    return [log_softmax(rows) for rows in logits(gguf, sequences, start=start, threads=threads, timeout=timeout)]


def log_softmax(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last of two dimensions, in fp32."""
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _existing(gguf: Path) -> str:
    if not Path(gguf).is_file():
        raise WhetError("the GGUF file is missing", where=str(gguf), fix="export the model first")
    return str(Path(gguf).absolute())


def _run(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    request = {**request, "packages": str(packages()), "threads": threads_for(request.get("threads"))}
    where = request.get("gguf") or ", ".join(
        dict.fromkeys(
            reading["gguf"] for task in ("tokenize", "detokenize", "logits") for reading in request.get(task, ())
        )
    )
    try:
        done = subprocess.run(
            ["node", str(_SCRIPT)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            env=environment(),
        )
    except subprocess.TimeoutExpired:
        raise WhetError(
            f"llama.cpp did not finish in {timeout:g} s", where=where, fix="give a longer timeout"
        ) from None
    if done.returncode != 0:
        raise WhetError(f"llama.cpp failed (exit code {done.returncode}):\n{done.stderr.strip()}", where=where)
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def _binary() -> str:
    key = (platform.system(), platform.machine())
    if key not in _BINARIES:
        raise WhetError(f"npm has no llama.cpp binary for {' '.join(key)}", fix="use another machine for this step")
    return _BINARIES[key]


def _version(package: Path) -> str | None:
    manifest = package / "package.json"
    return json.loads(manifest.read_text(encoding="utf-8"))["version"] if manifest.is_file() else None


def _npm_install(folder: Path, timeout: float) -> None:
    (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
    packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{_binary()}@{VERSION}"]
    # No install scripts: the package's own would look for a compiler and build llama.cpp. No optional packages: they
    # are the binaries for every other platform and for GPUs.
    command = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", *packages]
    try:
        done = subprocess.run(
            [str(shutil.which("npm")), *command[1:]], cwd=folder, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise WhetError(f"npm did not finish in {timeout:g} s", fix="check the network and try again") from None
    if done.returncode != 0:
        raise WhetError(
            f"npm could not install llama.cpp:\n{done.stderr.strip()}", fix="check the network and try again"
        )


def _move_into_place(modules: Path, folder: Path) -> None:
    """Rename, so that a process that looks meanwhile sees all of the packages or none."""
    target = folder / "node_modules"
    if target.exists() and find(folder) is None:
        shutil.rmtree(target)  # another version
    try:
        os.rename(modules, target)
    except OSError:
        if find(folder) is None:  # not merely another process that was first
            raise
