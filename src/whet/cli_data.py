"""The command line's verbs for data: `whet prep`, `whet data ...`, `whet doctor data`."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whet.errors import WhetError

console = Console(highlight=False)
data = typer.Typer(no_args_is_help=True, help="Versions of prepared data, keys and vaults.")
doctor = typer.Typer(no_args_is_help=True, help="Look for what is wrong.")

Runs = Annotated[Path, typer.Option(help="Folder of the runs.")]
Name = Annotated[str | None, typer.Argument(help="Name of the recipe; may be left out if there is one.")]


def prep(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    runs: Runs = Path("runs"),
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at once. Default: one a core.")] = None,
) -> None:
    """Prepare a recipe's data: read, clean, redact, deduplicate, split, check for leaks. Run it again to go on."""
    from whet.recipe import load
    from whet.recipe_data import version_of

    checked = load(recipe)
    try:
        version = version_of(checked, recipe.parent, runs, console, workers=workers)
    except KeyboardInterrupt:
        console.print(f"stopped; to go on: whet prep {escape(str(recipe))}", soft_wrap=True)
        raise typer.Exit(130) from None
    _show(version.manifest)
    console.print(f"[bold]done[/] {escape(str(version.folder))}", soft_wrap=True)


@data.command()
def log(name: Name = None, runs: Runs = Path("runs")) -> None:
    """The versions of a data set, the newest last."""
    from whet.data.prep.versions import SHOWN

    table = Table("version", "made", "train", "eval", box=None, header_style="bold")
    for entry in _store(name, runs).log():
        table.add_row(entry["digest"][:SHOWN], entry["made"], f"{entry['train']:,}", f"{entry['eval']:,}")
    console.print(table)


@data.command()
def show(
    name: Name = None,
    version: Annotated[str | None, typer.Option(help="First digits of its digest. Default: the newest.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """What was done to make a version, and where it lies."""
    found = _store(name, runs).version(version)
    found.check()
    _show(found.manifest)
    console.print(f"[bold]card[/] {escape(str(found.folder / 'card.html'))}", soft_wrap=True)


@data.command()
def diff(
    old: Annotated[str, typer.Argument(help="First digits of a version's digest.")],
    new: Annotated[str | None, typer.Argument(help="Of another. Default: the newest.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the recipe.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Rows that one version has and another has not, by side."""
    from whet.data.prep.versions import SIDES, difference

    store = _store(name, runs)
    found = difference(store.version(old), store.version(new))
    for side in SIDES:
        console.print(f"{side:<6}[green]+{len(found.added[side]):,}[/] [red]-{len(found.removed[side]):,}[/]")
    console.print(f"moved {len(found.moved):,}")


@data.command()
def key(path: Annotated[Path, typer.Argument(help="The file to make.")]) -> None:
    """Make a key for pseudonyms and vaults: a file that its owner alone can read."""
    from whet.data.redact.keys import make_key

    make_key(path)
    console.print(f"[bold]made[/] {escape(str(path))}; who has it can tell whom pseudonyms stand for", soft_wrap=True)


@data.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A text or JSONL file with replacements, as an answer of the model.")],
    vaults: Annotated[Path, typer.Option("--vault", help="Folder `vault` of a version.")],
    key: Annotated[str, typer.Option(help="The key that it was made with: a file, or env:NAME.")],
) -> None:
    """Print a file with the originals in the place of what redaction put there."""
    from whet.data.redact.keys import load_key
    from whet.data.redact.vault import restore, unseal_files

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WhetError(f"cannot read the file: {error}", where=str(file), fix="check the path") from error
    paths = sorted(vaults.glob("*.vault"))
    if not paths:
        raise WhetError("no vault in this folder", where=str(vaults), fix="name DATA/NAME/VERSION/vault")
    (restored,) = restore([text], unseal_files(paths, load_key(key if key.startswith("env:") else Path(key))))
    print(restored, end="")


@data.command()
def preview(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    out: Annotated[Path, typer.Argument(help="The HTML file to write. It holds text of the records.")],
    rows: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    side: Annotated[str, typer.Option(help="train or eval.")] = "train",
    runs: Runs = Path("runs"),
) -> None:
    """Rows as the model will see them: what is learned, what is masked, special tokens."""
    from whet.data.report.preview import preview_html
    from whet.data.template import tokenize
    from whet.recipe import load
    from whet.recipe_data import version_of
    from whet.recipe_model import tokenizer_of

    checked = load(recipe)
    if side not in ("train", "eval"):
        raise WhetError(f"no side is called {side!r}", where="--side", fix="use train or eval")
    version = version_of(checked, recipe.parent, runs, console)
    tokenizer = tokenizer_of(checked.model)
    options = {"max_length": checked.model.max_seq_length, "train_on": checked.data.train_on}
    first = islice(version.examples(side), rows)
    preview_html(tokenizer, [tokenize(tokenizer, example, **options) for example in first], out)
    console.print(f"[bold]wrote[/] {escape(str(out))}", soft_wrap=True)


@doctor.command("data")
def doctor_data(
    files: Annotated[list[str], typer.Argument(help="Files or globs of training rows, in any format whet reads.")],
    heldout: Annotated[list[str] | None, typer.Option("--eval", help="Files of held-out rows.")] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Files of evaluation tasks.")] = None,
    model: Annotated[str | None, typer.Option(help="Model whose template and tokenizer to check against.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Longest row, in tokens.")] = None,
    show_text: Annotated[bool, typer.Option("--show", help="Show text of the rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of a table.")] = False,
) -> None:
    """What is wrong with a data set: duplicates, leaks, foreign templates, odd answers, damage. Errors exit with 2."""
    from whet.data.doctor import examine, show, to_json
    from whet.data.formats import Source, load_examples
    from whet.data.similar.tasks import read_tasks
    from whet.models.load import load_tokenizer

    train, held = (load_examples([Source(file) for file in names], base=Path()) for names in (files, heldout or []))
    tokenizer = load_tokenizer(model) if model else None
    asked = read_tasks(tasks or [], Path())
    findings = examine(train, held, tokenizer, tasks=asked, max_length=max_length, show_text=show_text)
    if as_json:
        print(json.dumps(to_json(findings), indent=1))
    else:
        show(findings, console)
    if any(finding.severity == "error" for finding in findings):
        raise typer.Exit(2)


def _store(name: str | None, runs: Path) -> Any:
    from whet.data.prep.versions import Store, stores
    from whet.recipe_data import FOLDER

    root = runs / FOLDER
    if name is not None:
        return Store(root / name)
    found = stores(root)
    if len(found) != 1:
        names = ", ".join(store.folder.name for store in found)
        fix = f"name one of {names}" if found else "whet prep RECIPE"
        raise WhetError("several data sets" if found else "no data was prepared yet", where=str(root), fix=fix)
    return found[0]


def _show(manifest: dict[str, Any]) -> None:
    from whet.data.prep.versions import SHOWN

    stages = {name: stage for name, stage in manifest["stages"].items() if stage}
    console.print(f"[bold]{escape(manifest['name'])}[/] {manifest['digest'][:SHOWN]}")
    for name, stage in stages.items():
        shown = "  ".join(f"{key.replace('_', ' ')} [bold]{escape(_text(value))}[/]" for key, value in stage.items()
                          if value not in (None, {}, []) and not isinstance(value, dict))  # fmt: skip
        console.print(f"[green]{name:<8}[/]{shown}", soft_wrap=True)
    if redact := stages.get("redact"):
        found = ", ".join(f"{name} {count:,}" for name, count in redact["found"].items())
        console.print(f"[green]{'':<8}[/]{found or 'nothing found'}", soft_wrap=True)
        for name, why in redact["not_covered"].items():
            console.print(f"[yellow]{'':<8}{name} is not fully covered:[/] {escape(why)}", soft_wrap=True)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
