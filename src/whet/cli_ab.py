"""`whet ab`: people compare two models' answers without knowing which is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

ab = typer.Typer(no_args_is_help=True, help="Blind comparison of models' answers by people, on a local web page.")
console = Console(highlight=False)

Folder = Annotated[Path, typer.Argument(help="The study's folder.")]
Url = Annotated[str, typer.Option(help="The address that graders open; links begin with it.")]
ADDRESS = "http://127.0.0.1:8017"


@ab.command()
def new(
    folder: Folder,
    files: Annotated[list[str], typer.Argument(help="Files of answers, or NAME=FILE; a run's answers.jsonl alone.")],
    grader: Annotated[list[str] | None, typer.Option(help="A grader's name. Repeat it for more.")] = None,
    title: Annotated[str, typer.Option(help="Stands on top of the page.")] = "Comparing answers",
    question: Annotated[str, typer.Option(help="What graders are asked.")] = "Which answer is better?",
    reference: Annotated[bool, typer.Option("--reference", help="Show the reference answer too.")] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Leave out items that a file lacks.")] = False,
    sample: Annotated[int | None, typer.Option(min=1, help="Take this many items, by lot.")] = None,
    url: Url = ADDRESS,
) -> None:
    """Make a study, and print the links of its owner and graders. They cannot be shown again, only renewed."""
    from whet.evals.ab.answers import read_named
    from whet.evals.ab.study import create
    from whet.evals.ab.votes import Log

    systems = [system for file in files for system in read_named(file)]
    study = create(
        folder, systems, title=title, question=question, show_reference=reference, shared=shared, sample=sample
    )
    with Log(folder / "votes.jsonl", study, new=True) as log:
        _show_link("owner", url, log.add_link("owner", "owner"))
        for name in grader or []:
            _show_link(name, url, log.add_link("grader", name))
    same = sum(study.identical(first, second) for first, second in study.pairs)
    console.print(f"{len(study.comparisons):,} comparisons a grader; {same:,} with the same answers are not asked")
    console.print(f"[bold]next[/] whet ab serve {escape(str(folder))}", soft_wrap=True)


@ab.command()
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8017,
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    url: Annotated[str | None, typer.Option(help="The address that graders open.")] = None,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="Let other machines in without TLS.")] = False,
) -> None:
    """Serve a study's pages until Ctrl-C. Every vote is on the disk before the page says so."""
    from whet.evals.ab.extra import need_web

    need_web()
    from whet.evals.ab import server

    def ready(address: str) -> None:
        console.print(f"[bold]open[/] {escape(address)} with your link; Ctrl-C stops", soft_wrap=True)

    try:
        server.serve(
            folder,
            ready=ready,
            host=host,
            port=port,
            certificate=certificate,
            key=key,
            url=url,
            plain_http=plain_http,
        )
    except KeyboardInterrupt:
        console.print(f"stopped; all votes are saved. To go on: whet ab serve {escape(str(folder))}", soft_wrap=True)
        raise typer.Exit(130) from None


@ab.command()
def link(
    folder: Folder,
    grader: Annotated[str | None, typer.Argument(help="A grader's name, new or known. Default: the owner.")] = None,
    url: Url = ADDRESS,
) -> None:
    """Add a grader, or renew someone's link; the old link ends. While the server runs, use the owner's page."""
    from whet.evals.ab.study import load
    from whet.evals.ab.votes import Log

    with Log(folder / "votes.jsonl", load(folder)) as log:
        token = log.add_link("grader", grader) if grader is not None else log.add_link("owner", "owner")
        _show_link(grader or "owner", url, token)


@ab.command()
def close(folder: Folder) -> None:
    """End a study: no more votes, and the results can be seen. While the server runs, use the owner's page."""
    from whet.evals.ab.study import load
    from whet.evals.ab.votes import Closed, Log, now

    with Log(folder / "votes.jsonl", load(folder)) as log:
        log.append(Closed(time=now()))
    console.print(f"[bold]closed[/]; see whet ab results {escape(str(folder))}", soft_wrap=True)


@ab.command()
def results(
    folder: Folder,
    json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a line a vote to this file.")] = None,
) -> None:
    """What the graders said, once the study is closed."""
    from whet.evals.ab import export
    from whet.evals.ab.results import results as tally
    from whet.evals.ab.study import load
    from whet.evals.ab.votes import read

    study = load(folder)
    found = tally(study, read(folder / "votes.jsonl", study))
    for path, text in ((json, export.as_json), (csv, export.as_csv)):
        if path is not None:
            export.save(text(found), path)
            console.print(f"[bold]wrote[/] {escape(str(path))}", soft_wrap=True)
    console.print(escape(export.as_text(found)), end="", soft_wrap=True)


def _show_link(name: str, url: str, token: str) -> None:
    console.print(f"[bold]{escape(name)}[/] {escape(url.rstrip('/'))}/join#{token}", soft_wrap=True)
