"""`whet serve`, and `whet keys` for who may ask it."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from whet.errors import WhetError

if TYPE_CHECKING:
    from whet.serve.auth import Authenticator
    from whet.serve.gate import Identifies
    from whet.serve.jwt import Tokens

keys = typer.Typer(no_args_is_help=True, help="Keys for `whet serve`: who may ask which models, and how much.")
console = Console(highlight=False)
told = Console(stderr=True, highlight=False)

KeyFile = Annotated[Path | None, typer.Option("--file", help="The keys' file. Default: in your folder of settings.")]
PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "jwt": "PyJWT",
    "httpx2": "httpx2",
}


def serve(
    model: Annotated[str, typer.Argument(help="A model's folder, an export's, a GGUF file, or a vLLM's address.")],
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    engine: Annotated[str, typer.Option(help="auto, transformers, llama.cpp or vllm.")] = "auto",
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=DIR: a LoRA adapter on the model. Repeat it.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="A folder of adapters, each loaded when asked for.")] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the key of the vLLM at the address.")
    ] = None,
    upstream_plain_http: Annotated[
        bool, typer.Option("--upstream-plain-http", help="Ask a vLLM on another machine without TLS.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.")] = 8000,
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    plain_http: Annotated[bool, typer.Option("--plain-http", help="Let other machines in without TLS.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="A name that clients may use. Repeat it.")] = None,
    key_file: Annotated[Path | None, typer.Option("--keys", help="The file of `whet keys`.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask for no key; on this machine alone.")] = False,
    jwks: Annotated[str | None, typer.Option(help="Take JWTs by the keys of this file or https address.")] = None,
    jwt_issuer: Annotated[str, typer.Option(help="What their `iss` must be.")] = "",
    jwt_audience: Annotated[str, typer.Option(help="What their `aud` must hold.")] = "",
    jwt_algorithm: Annotated[list[str] | None, typer.Option(help="Default: RS256, ES256, EdDSA. Repeat it.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of a key that has no limit itself.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Of a key that has no limit itself.")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Of a key that has no limit itself.")] = None,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests at once, all keys together.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of one answer at most.")] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of one request at most.")] = 4 * 2**20,
    log: Annotated[Path | None, typer.Option(help="File of the request log. Default: stderr.")] = None,
    log_content: Annotated[bool, typer.Option("--log-content", help="Log prompts and answers as well.")] = False,
    no_page: Annotated[bool, typer.Option("--no-page", help="Leave the chat page out.")] = False,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time for running answers after SIGTERM.")] = 30.0,
) -> None:
    """Serve a model, and adapters on it, by OpenAI's API, until Ctrl-C or SIGTERM."""
    _need_packages()
    from whet.cli_quiet import quiet_libraries
    from whet.serve import server
    from whet.serve.access_log import AccessLog
    from whet.serve.app import Parts
    from whet.serve.engines.choice import open_engine
    from whet.serve.engines.vllm.address import key_from
    from whet.serve.limits import Allowance, Limits, Settings

    address = server.Address(host, port, certificate, key, plain_http)
    address.check(authenticated=not no_auth)
    tokens = _tokens(jwks, jwt_issuer, jwt_audience, jwt_algorithm)
    auth = _auth(key_file, tokens, no_auth=no_auth)
    quiet_libraries()
    parts = Parts(
        auth=auth,
        settings=Settings(max_body=max_body, max_tokens=max_tokens, in_flight=in_flight),
        limits=Limits(Allowance(requests_per_minute, tokens_per_minute, concurrent), in_flight),
        log=AccessLog(log, content=log_content),
        hosts=address.names(allow_host or ()),
        page=not no_page,
    )
    opened = open_engine(
        model,
        engine,
        name=name,
        adapters=_pairs(adapter or []),
        adapters_folder=adapters,
        upstream_key=key_from(upstream_key_env) if upstream_key_env else None,
        upstream_plain_http=upstream_plain_http,
    )

    def ready(url: str) -> None:
        names = ", ".join(served.name for served in opened.models())
        page = "" if no_page else f"; chat page at {escape(url)}/"
        console.print(f"[bold]ready[/] {escape(url)}/v1 serves {escape(names)}{page}; Ctrl-C stops", soft_wrap=True)

    ended_by = server.serve(opened, parts, address, ready=ready, drain_seconds=drain_seconds)
    if ended_by == SIGINT:
        raise typer.Exit(130)


def _need_packages() -> None:
    if missing := [package for module, package in PACKAGES.items() if find_spec(module) is None]:
        what = f"serving needs {' and '.join(missing)}, not installed here"
        raise WhetError(what, where="whet serve", fix='pip install "whet[serve]"')


def _tokens(jwks: str | None, issuer: str, audience: str, algorithms: list[str] | None) -> Tokens | None:
    """Raises WhetError for rules under which anybody's token would do."""
    if jwks is None:
        if issuer or audience or algorithms:
            fix = "give --jwks, the issuer's key set"
            raise WhetError("tokens can't be checked without keys", where="--jwt-issuer", fix=fix)
        return None
    from whet.serve.jwt import DEFAULT, FileKeySet, Rules, Tokens, UrlKeySet

    rules = Rules(issuer, audience, tuple(algorithms or DEFAULT))
    return Tokens(rules, UrlKeySet(jwks) if "://" in jwks else FileKeySet(Path(jwks)))


def _auth(path: Path | None, tokens: Tokens | None, *, no_auth: bool) -> Identifies:
    from whet.serve.auth import Authenticator, Open
    from whet.serve.keys import KeyRing, default_path, read

    if no_auth:
        if path or tokens:
            fix = "leave one of the two out"
            raise WhetError("keys are given, and nobody would be asked for one", where="--no-auth", fix=fix)
        return Open()
    file = path or default_path()
    valid = [key for key in read(file) if key.state(datetime.now(UTC)) == "valid"]
    if valid or tokens:
        return Authenticator(KeyRing(file), tokens)
    if path is not None or not sys.stdout.isatty():
        fix = f"whet keys add NAME{f' --file {path}' if path else ''}"
        raise WhetError("there is no valid key, so nobody could ask", where=str(file), fix=fix)
    return _for_this_run()


def _for_this_run() -> Authenticator:
    """A key that ends with the process, told to whoever sits at the terminal; to a log it would never be written."""
    from whet.serve.auth import Authenticator
    from whet.serve.keys import KeyRing, new

    key, token = new("terminal")
    console.print(f"[bold]key[/] {token} (for this run; `whet keys add NAME` makes one that stays)", soft_wrap=True)
    return Authenticator(KeyRing(only=[key]))


def _pairs(adapters: list[str]) -> dict[str, Path]:
    pairs = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not equals or not name or not folder:
            raise WhetError(
                f"{given!r} is no NAME=DIR", where="--adapter", fix="write --adapter support=runs/x/adapter"
            )
        if name in pairs:
            raise WhetError(f"two adapters are called {name}", where="--adapter", fix="give each a name of its own")
        pairs[name] = Path(folder)
    return pairs


# ---------------------------------------------------------------- keys


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="Whom the key is for; stands in logs.")],
    model: Annotated[list[str] | None, typer.Option(help="A model it may use. Repeat it. Default: all.")] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="chat, completions, embeddings, models or metrics. Repeat it. Default: all but metrics."),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="12h, 30d, 8w or a date. Default: never.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1)] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    file: KeyFile = None,
) -> None:
    """Make a key and print it, this once: the file keeps only a digest."""
    from whet.serve import keys as store
    from whet.serve.auth import ENDPOINTS
    from whet.serve.limits import Allowance

    path = file or store.default_path()
    token = store.add(
        path,
        name,
        models=model,
        endpoints=endpoint or ENDPOINTS,
        expires=store.until(expires, datetime.now(UTC)) if expires else None,
        allowance=Allowance(requests_per_minute, tokens_per_minute, concurrent),
    )
    print(token)
    told.print(f"kept in {escape(str(path))} as a digest; the key can't be shown again", soft_wrap=True)


@keys.command("list")
def list_(file: KeyFile = None) -> None:
    """Show all keys: id, name, state, and what they may."""
    from whet.serve import keys as store

    now = datetime.now(UTC)
    for key in store.read(file or store.default_path()):
        models = "all models" if key.models is None else ", ".join(key.models)
        until = f", until {key.expires:%Y-%m-%d %H:%M} UTC" if key.expires else ""
        allowed = f"{models}; {', '.join(key.endpoints)}{_limits(key)}{until}"
        console.print(f"{key.id}  [bold]{escape(key.name)}[/]  {key.state(now)}  {escape(allowed)}", soft_wrap=True)


def _limits(key: object) -> str:
    named = {"requests_per_minute": "requests/min", "tokens_per_minute": "tokens/min", "concurrent": "at once"}
    found = {words: getattr(key, field) for field, words in named.items()}
    return "".join(f"; {value} {words}" for words, value in found.items() if value is not None)


@keys.command()
def revoke(who: Annotated[str, typer.Argument(help="The key's name or id.")], file: KeyFile = None) -> None:
    """End a key. A running server refuses it from its next request on."""
    from whet.serve import keys as store

    key = store.revoke(file or store.default_path(), who)
    console.print(f"[bold]revoked[/] {key.id} {escape(key.name)}", soft_wrap=True)
