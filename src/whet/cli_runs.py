"""The command line's verbs for runs: `whet runs ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from whet.recipe import Recipe
    from whet.runs.store import Run

console = Console(highlight=False)
runs = typer.Typer(no_args_is_help=True, help="What was run: look, compare, repeat, verify, make room.")

Root = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
Name = Annotated[str, typer.Argument(help="A run: its id, the beginning of it, or its folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]


@runs.command("list")
def list_(root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """Every run, the latest last."""
    from whet.runs.browse import list_runs

    found = list_runs(root)
    if as_json:
        print(json.dumps([_plain(run) for run in found], indent=1))
        return
    table = Table("run", "started", "state", "steps", "loss", "size", box=None, header_style="bold")
    for run in found:
        loss = "" if run.loss is None else f"{run.loss:.4g}"
        state = f"[red]{run.state}[/]" if run.fault else run.state
        table.add_row(escape(run.id), run.started[:19], state, f"{run.steps:,}", loss, f"{run.size / 1e6:,.1f} MB")
    console.print(table)
    for run in found:
        if run.fault:
            console.print(f"[red]damaged[/] {escape(run.fault)}", soft_wrap=True)


@runs.command()
def show(run: Name, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """One run: what it ran on, how far it came, its numbers."""
    from whet.runs.browse import summary
    from whet.runs.folders import facts, find

    folder = find(root, run)
    seen, known = summary(folder), facts(folder)
    if as_json:
        print(json.dumps(_plain(seen) | {"facts": known}, indent=1))
        return
    lines = {"state": seen.state, "stages": ", ".join(seen.stages), "steps": f"{seen.steps:,}", "loss": seen.loss}
    lines |= seen.scores | {name: known.get(name) for name in ("started", "command", "git", "memory")}
    lines |= {"versions": known.get("versions"), "hardware": known.get("hardware"), "inputs": known.get("inputs")}
    console.print(f"[bold]{escape(seen.id)}[/] in {escape(str(folder))}", soft_wrap=True)
    for name, value in lines.items():
        if value not in (None, "", {}):
            console.print(f"[green]{escape(name):<10}[/] {escape(_text(value))}", soft_wrap=True)


@runs.command()
def diff(left: Name, right: Name, root: Root = Path("runs"), as_json: AsJson = False) -> None:
    """How two runs differ: recipe, inputs, versions, hardware, code, metrics. Exits with 1 if they do."""
    from whet.runs.browse import diff as compare
    from whet.runs.folders import find

    found = compare(find(root, left), find(root, right))
    if as_json:
        print(json.dumps(found.parts, indent=1))
    else:
        for part, values in found.parts.items():
            table = Table(f"[green]{part}[/]", left, right, box=None, header_style="bold", title_justify="left")
            for name, pair in values.items():
                table.add_row(escape(name), *(escape(_text(value)) for value in pair))
            if values:
                console.print(table)
        if not found:
            console.print("they do not differ")
    raise typer.Exit(1 if found else 0)


@runs.command()
def reproduce(
    run: Name,
    root: Root = Path("runs"),
    base: Annotated[Path | None, typer.Option(help="Where its data lies. Default: where it lay.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also with other versions or on other hardware.")] = False,
) -> None:
    """Run it again from its stored recipe and compare the weights bit by bit. Exits with 1 if they differ."""
    from whet.cli_quiet import quiet_libraries

    quiet_libraries()
    from whet.pipeline import run_recipe
    from whet.runs.folders import find
    from whet.runs.reproduce import reproduce as again

    def whole(recipe: Recipe, place: Path, fresh: Path) -> Run:
        return run_recipe(recipe, place, fresh, console)

    try:
        result = again(find(root, run), root, whole, base=base, anyway=anyway)
    except KeyboardInterrupt:
        console.print("stopped; nothing of it was kept")
        raise typer.Exit(130) from None
    if result.same:
        console.print(f"[bold]the same[/] {escape(result.run)}: every weight is equal to the bit", soft_wrap=True)
        return
    console.print(f"[red]it differs[/] {escape(str(result.folder))}", soft_wrap=True)
    if not result.same_data:
        console.print("its data was prepared to another version; `whet data diff` compares versions")
    if result.first_step is not None:
        console.print(f"the loss differs from step {result.first_step} on")
    for name, most in list(result.tensors.items())[:10]:
        console.print(f"  {escape(name)} by up to {most:.3g}", soft_wrap=True)
    raise typer.Exit(1)


@runs.command()
def prune(
    names: Annotated[list[str] | None, typer.Argument(help="Runs to remove.")] = None,
    root: Root = Path("runs"),
    older_than: Annotated[float | None, typer.Option(min=0, help="Runs untouched for so many days.")] = None,
    keep: Annotated[int, typer.Option(min=0, help="Of old runs, keep the latest so many of each name.")] = 1,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Old runs that stopped on the way, too.")] = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Checkpoints of finished runs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without this, say what would be done.")] = False,
) -> None:
    """Remove checkpoints and old runs; never the baseline of another run. Shows what it would do, unless --yes."""
    from whet.runs.ledger import NAME, Ledger
    from whet.runs.prune import Rules, plan, remove
    from whet.runs.signing import key_in_use

    items = plan(root, Rules(tuple(names or ()), older_than, keep, unfinished, checkpoints))
    for item in items:
        mark, note = ("[yellow]keep  [/]", item.kept) if item.kept else ("[red]remove[/]", item.rule)
        size = f"{item.size / 1e6:,.1f} MB"
        console.print(f"{mark} {escape(str(item.folder))}  {size}  {escape(note)}", soft_wrap=True)
    if yes:
        freed = remove(root, items, Ledger(root / NAME, key_in_use()))
        console.print(f"[bold]removed[/] {freed / 1e6:,.1f} MB")
    else:
        would = sum(item.size for item in items if item.kept is None)
        console.print(f"{would / 1e6:,.1f} MB to remove; nothing was removed: give --yes")


@runs.command()
def verify(
    root: Root = Path("runs"),
    key: Annotated[Path | None, typer.Option(help="Public key of the ledger, kept apart from it.")] = None,
    since: Annotated[str | None, typer.Option(help="EVENTS:HASH that an earlier verify printed.")] = None,
    every_signature: Annotated[bool, typer.Option("--every-signature", help="Check each event's signature.")] = False,
    ledger_only: Annotated[bool, typer.Option("--ledger-only", help="Do not read the files of the runs.")] = False,
) -> None:
    """Find what was changed, removed, added or moved in the ledger and in what the runs made. Exits with 1 if so."""
    from whet.runs.audit import audit
    from whet.runs.ledger import NAME, read_head
    from whet.runs.signing import load_public
    from whet.runs.verify import Anchor

    public = load_public(key) if key else None
    anchor = Anchor.parse(since) if since else None
    faults = audit(root, public_key=public, since=anchor, every_signature=every_signature, files=not ledger_only)
    for fault in faults:
        console.print(f"[red]fault[/] [bold]{escape(fault.where)}[/]: {escape(fault.what)}", soft_wrap=True)
    if faults:
        console.print(f"[red]{len(faults):,} faults[/]")
        raise typer.Exit(1)
    head = read_head(root / NAME)
    assert head is not None
    if head.signature and not public:
        console.print("[yellow]signed, and no signature was checked:[/] give --key FILE.pub")
    signed = ", signed with the key given" if public else ""
    console.print(
        f"[bold]whole[/] {head.events:,} events{signed}; --since {Anchor(head.events, head.last)}", soft_wrap=True
    )


@runs.command()
def key(path: Annotated[Path, typer.Argument(help="The file to make, outside of the runs.")]) -> None:
    """Make a key that signs the ledger: a file that its owner alone can read, and FILE.pub for who verifies."""
    from whet.runs.signing import VARIABLE, make_key

    public = make_key(path)
    console.print(f"[bold]made[/] {escape(str(path))}, and {escape(str(public))} to verify with", soft_wrap=True)
    console.print(f"to sign: export {VARIABLE}={escape(str(path.absolute()))}", soft_wrap=True)


def _plain(run: Any) -> dict[str, Any]:
    """A summary as JSON can hold it."""
    return {"id": run.id} | {name: str(v) if isinstance(v, Path) else v for name, v in vars(run).items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "—" if value is None else json.dumps(value)
