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
    return _run({"gguf": _existing(gguf), "tokenize": list(texts)}, timeout)["tokens"]


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
    threads: None leaves the number to llama.cpp. timeout: seconds for all prompts together.
    Raises WhetError where llama.cpp is not installed, fails (its messages are in the error), or runs out of time.
    """
    if max_new_tokens < 1:
        raise WhetError(f"max_new_tokens is {max_new_tokens}", where="max_new_tokens", fix="ask for 1 token or more")
    if any(len(prompt) == 0 for prompt in prompts):
        raise WhetError("a prompt is empty", where="prompts", fix="give each prompt at least one token")
    if not prompts:
        return []
    request = {"gguf": _existing(gguf), "generate": list(prompts), "maxNewTokens": max_new_tokens, "threads": threads}
    return [
        Generation(g["promptTokenIds"], g["tokenIds"], g["text"], g["stopped"])
        for g in _run(request, timeout)["generations"]
    ]


def _existing(gguf: Path) -> str:
    if not Path(gguf).is_file():
        raise WhetError("the GGUF file is missing", where=str(gguf), fix="export the model first")
    return str(Path(gguf).absolute())


def _run(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    folder = find()
    if folder is None:
        raise WhetError(
            "llama.cpp is not installed",
            where=str(default_folder()),
            fix="run whet.export.llama_cpp.install(), or set WHET_NODE to the folder it is in",
        )
    request = {**request, "packages": str(folder / "node_modules")}
    try:
        done = subprocess.run(
            ["node", str(_SCRIPT)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            env={**os.environ, "NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true"},
        )
    except subprocess.TimeoutExpired:
        raise WhetError(
            f"llama.cpp did not finish in {timeout:g} s", where=request["gguf"], fix="give a longer timeout"
        ) from None
    if done.returncode != 0:
        raise WhetError(
            f"llama.cpp failed (exit code {done.returncode}):\n{done.stderr.strip()}", where=request["gguf"]
        )
    return json.loads(done.stdout)


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
