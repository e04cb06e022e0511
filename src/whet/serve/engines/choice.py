"""Which engine serves what `whet serve` was given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import SecretStr

from whet.errors import WhetError
from whet.serve.engines.vllm.address import EXAMPLE, Address, is_address
from whet.serve.interface import Engine

ENGINES = ("auto", "transformers", "llama.cpp", "vllm")


def open_engine(
    model: str,
    engine: str = "auto",
    *,
    name: str | None = None,
    adapters: Mapping[str, Path] | None = None,
    adapters_folder: Path | None = None,
    upstream_key: SecretStr | None = None,
    upstream_plain_http: bool = False,
) -> Engine:
    """An engine for a model's folder, an export's, a GGUF file or a server's address, not started yet.

    upstream_key: what the server at the address wants. upstream_plain_http: it may be asked without TLS, though it is
    another machine. Raises WhetError.
    """
    if engine not in ENGINES:
        raise WhetError(f"unknown engine {engine!r}", where="--engine", fix=f"use {', '.join(ENGINES)}")
    where, of_export = located(model)
    chosen = chosen_for(where) if engine == "auto" else engine
    if chosen != "transformers" and (adapters or adapters_folder):
        raise WhetError(f"adapters are not loaded by {chosen} here", where="--adapter", fix=ADAPTERS[chosen])
    if chosen != "vllm" and (upstream_key or upstream_plain_http):
        fix = f"give the server's address as the model, like {EXAMPLE}, or leave --upstream-... out"
        raise WhetError("no server is asked for this model", where=model, fix=fix)
    if adapters_folder is not None and not adapters_folder.is_dir():
        raise WhetError(
            "there is no such folder", where=f"--adapters {adapters_folder}", fix="make it, or leave it out"
        )
    name = name or of_export
    if chosen == "vllm":
        from whet.serve.engines.vllm.engine import VllmEngine

        return VllmEngine(Address.of(where, upstream_key, plain_http=upstream_plain_http), name=name)
    if chosen == "llama.cpp":
        from whet.serve.engines.llama_cpp.engine import LlamaCppEngine

        return LlamaCppEngine(where, name=name)
    from whet.serve.engines.in_process import open_engine as transformers

    _check_folder(where)
    return transformers(where, name=name, adapters=adapters, adapters_folder=adapters_folder)


ADAPTERS = {
    "llama.cpp": "serve the base's folder with --engine transformers, or export the adapter merged",
    "vllm": "give them to vLLM: vllm serve DIR --enable-lora --lora-modules NAME=DIR",
}


def located(model: str) -> tuple[str, str | None]:
    """The model in what was given, and its name where that is another: of a whole export the merged model, else its
    only GGUF file, by the export's name. Raises WhetError where there are several."""
    folder = Path(model)
    if not folder.is_dir() or _is_model(folder):
        return model, None
    name = folder.resolve().name
    if _is_model(folder / "merged"):
        return str(folder / "merged"), name
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise WhetError(f"{len(files)} GGUF files", where=model, fix=f"name one, as {files[0]}")
    return (str(files[0]), name) if files else (model, None)


def chosen_for(model: str) -> str:
    """By what it is: a server's address, a GGUF file, or a folder of transformers."""
    if is_address(model):
        return "vllm"
    return "llama.cpp" if Path(model).suffix == ".gguf" else "transformers"


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "modules.json").is_file()


def _check_folder(model: str) -> None:
    """transformers would take any other name for one of a model hub, and ask there."""
    if not model.startswith("builtin:") and not _is_model(Path(model)):
        fix = "give the folder of a model or of an export, or a .gguf file"
        raise WhetError("no model's folder: it has no config.json", where=model, fix=fix)
