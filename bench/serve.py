"""Serving the built-in model to many streaming clients at once, by whet and by others' servers, on this machine.

    python bench/serve.py [--clients 200] [--tokens 64] [--minutes 10] [--llama-server PATH] [--out FILE]

Each client asks for something of its own, greedily, by OpenAI's chat API, and reads the stream. Lines of the output:

    streams     all clients at once, each once: answers that are not what the same request got alone (lost or mixed),
                seconds to the first piece and to the end, tokens a second
    memory      the same load again and again for some minutes, a third of the clients leaving in the middle of their
                answer: the server's resident memory over time, and what it still holds at the end
    throughput  the load of `streams` against each server in turn, three rounds, the best of each: whet and
                `transformers serve`, with continuous batching and without, on the model's folder in fp32; whet and
                llama.cpp's own server on its GGUF file, in F32 too

llama.cpp's server is a program of its own, built from the same release as whet's llama.cpp: --llama-server says where
it is. Servers run as processes of their own, on the same cores as the clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from environment import ROOT, origin

from whet.export.gguf import write_gguf
from whet.export.llama_cpp import threads_for

MODEL = ROOT / "src" / "whet" / "builtin" / "tiny"
TOPICS = ("rain", "bread", "a river", "two cats", "the moon", "a red door", "winter", "an old clock")
CONTEXT = 256  # tokens of a question and its answer, more than enough
LEAVERS = 3  # of so many clients one leaves early, in `memory`


@dataclass(frozen=True)
class Server:
    """A running server. name: its line's; model: what it calls the model."""

    name: str
    url: str
    model: str
    process: psutil.Process


@dataclass(frozen=True)
class Answer:
    """first, seconds: from the request to the first piece of text and to the end. pieces: events with text."""

    text: str
    first: float
    seconds: float
    pieces: int
    finish: str | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's own server; `throughput` needs it")
    parser.add_argument("--only", choices=("streams", "memory", "throughput"), action="append")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "serve.jsonl")
    asked = parser.parse_args()
    where = origin("fastapi", "uvicorn", "llguidance")
    for what in asked.only or ("streams", "memory", "throughput"):
        asyncio.run(tell(MEASURED[what](asked), asked, where))


async def tell(lines: AsyncIterator[dict[str, Any]], asked: argparse.Namespace, where: dict[str, Any]) -> None:
    async for line in lines:
        line = {"kind": "serve", **line, "clients": asked.clients, "tokens": asked.tokens}
        print(json.dumps(line), flush=True)
        with open(asked.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | where) + "\n")


# ---------------------------------------------------------------- what is measured


async def streams(asked: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    with whet() as server:
        alone = [await ask(server, i, asked.tokens) for i in range(asked.clients)]
        answers, seconds = await at_once(server, asked.clients, asked.tokens)
    wrong = sum(a.text != b.text or a.finish != b.finish for a, b in zip(alone, answers, strict=True))
    yield {
        "what": "streams",
        "server": server.name,
        "different_answers": len({answer.text for answer in alone}),
        "lost_or_mixed": wrong,
        "seconds": round(seconds, 2),
        "first_piece": percentiles([answer.first for answer in answers]),
        "whole_answer": percentiles([answer.seconds for answer in answers]),
        "pieces_a_second": round(sum(answer.pieces for answer in answers) / seconds, 1),
        "alone_first_piece": percentiles([answer.first for answer in alone]),
    }


async def memory(asked: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    with whet() as server:
        end = time.monotonic() + asked.minutes * 60
        samples: list[tuple[float, float]] = []
        stop = asyncio.Event()
        watching = asyncio.create_task(watch(server, samples, stop))
        done = await asyncio.gather(*(client(server, i, asked.tokens, end) for i in range(asked.clients)))
        await asyncio.sleep(1)
        stop.set()
        await watching
        held = await metric(server, "running"), await metric(server, "cache_used")
    half = [mib for seconds, mib in samples if seconds > asked.minutes * 30]
    yield {
        "what": "memory",
        "server": server.name,
        "minutes": asked.minutes,
        "answers": sum(answers for answers, _ in done),
        "left_early": sum(left for _, left in done),
        "rss_mib_after_a_tenth": round(samples[len(samples) // 10][1], 1),
        "rss_mib_second_half": [round(min(half), 1), round(max(half), 1)],
        "rss_mib_last": round(samples[-1][1], 1),
        "running_and_cache_used_after": held,
    }


async def throughput(asked: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    if asked.llama_server is None:
        raise SystemExit("throughput is measured beside llama.cpp's own server too: --llama-server PATH")
    with tempfile.TemporaryDirectory() as folder:
        gguf = write_gguf(MODEL, Path(folder) / "tiny.gguf", "f32").path
        servers = [
            whet(),
            transformers_continuous(),
            transformers_plain(),
            whet("whet, llama.cpp", str(gguf)),
            llama_cpp(asked.llama_server, gguf),
            llama_cpp(asked.llama_server, gguf, at_once=32),
        ]
        for server in servers:
            yield await rates(server, asked)


async def rates(starting: AbstractContextManager[Server], asked: argparse.Namespace) -> dict[str, Any]:
    """The best of several rounds on a server that has answered before."""
    rounds = []
    with starting as server:
        await ask(server, 0, 4)
        for _ in range(asked.rounds):
            answers, seconds = await at_once(server, asked.clients, asked.tokens)
            rounds.append((tokens_in(answers) / seconds, seconds, answers))
    rate, seconds, answers = max(rounds, key=lambda of: of[0])
    return {
        "what": "throughput",
        "server": server.name,
        "tokens_a_second": round(rate, 1),
        "seconds": round(seconds, 2),
        "rounds": [round(rate, 1) for rate, _, _ in rounds],
        "first_piece": percentiles([answer.first for answer in answers]),
        "whole_answer": percentiles([answer.seconds for answer in answers]),
        "empty": sum(not answer.text for answer in answers),
    }


MEASURED = {"streams": streams, "memory": memory, "throughput": throughput}


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def tokens_in(answers: list[Answer]) -> int:
    """Of all answers together, counted by the tokenizer: servers count differently."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return sum(len(tokenizer(answer.text, add_special_tokens=False)["input_ids"]) for answer in answers)


# ---------------------------------------------------------------- clients


def body(server: Server, who: int, tokens: int) -> dict[str, Any]:
    question = f"Write {who % 7 + 2} sentences about {TOPICS[who % len(TOPICS)]} and the number {who}."
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }


async def ask(server: Server, who: int, tokens: int, session: aiohttp.ClientSession | None = None) -> Answer:
    if session is None:
        async with new_session() as session:
            return await ask(server, who, tokens, session)
    start = time.perf_counter()
    first, text, pieces, finish = 0.0, "", 0, None
    async for event in events(server, session, body(server, who, tokens)):
        choice = event["choices"][0] if event["choices"] else {}
        if piece := choice.get("delta", {}).get("content"):
            first = first or time.perf_counter() - start
            text, pieces = text + piece, pieces + 1
        finish = choice.get("finish_reason") or finish
    return Answer(text, first, time.perf_counter() - start, pieces, finish)


async def events(server: Server, session: aiohttp.ClientSession, asked: dict[str, Any]) -> AsyncIterator[Any]:
    async with session.post(f"{server.url}/v1/chat/completions", json=asked) as response:
        if response.status != 200:
            raise SystemExit(f"{server.name}: {response.status} {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:])


async def at_once(server: Server, clients: int, tokens: int) -> tuple[list[Answer], float]:
    async with new_session() as session:
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(server, i, tokens, session) for i in range(clients)))
        return list(answers), time.perf_counter() - start


async def client(server: Server, who: int, tokens: int, end: float) -> tuple[int, int]:
    """Asks until `end`; one in LEAVERS leaves each answer after a few pieces. (answers read, answers left)."""
    answers = left = 0
    async with new_session() as session:
        while time.monotonic() < end:
            if who % LEAVERS:
                await ask(server, who + answers, tokens, session)
                answers += 1
            else:
                stream = events(server, session, body(server, who + left, tokens))
                for _ in range(3 + left % 5):
                    await anext(stream, None)
                await stream.aclose()  # type: ignore[attr-defined]
                left += 1
    return answers, left


def new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=1800))


async def watch(server: Server, samples: list[tuple[float, float]], stop: asyncio.Event) -> None:
    """(seconds, MiB resident), every second."""
    start = time.monotonic()
    while not stop.is_set():
        samples.append((time.monotonic() - start, server.process.memory_info().rss / 2**20))
        await asyncio.sleep(1)


async def metric(server: Server, name: str) -> float | None:
    """What the engine says of its load, from /metrics; None where it says nothing by that name."""
    async with new_session() as session, session.get(f"{server.url}/metrics") as response:
        found = re.search(rf'^whet_engine{{what="{name}"}} (\S+)$', await response.text(), re.MULTILINE)
    return float(found[1]) if found else None


# ---------------------------------------------------------------- servers


@contextmanager
def whet(name: str = "whet", model: str = "builtin:tiny") -> Iterator[Server]:
    command = [sys.executable, "-m", "whet.cli", "serve", model, "--name", "tiny", "--no-auth"]
    with process(name, [*command, "--port", "{port}"], "tiny") as server:
        yield server


@contextmanager
def llama_cpp(program: Path, gguf: Path, *, at_once: int | None = None) -> Iterator[Server]:
    """As it starts by itself; at_once: with so many answers at the same time, on as many threads as whet gives it."""
    command = [str(program), "--model", str(gguf), "--port", "{port}", "--alias", "tiny"]
    if at_once is None:
        name = "llama.cpp"
    else:
        name, context = f"llama.cpp, {at_once} at once", str(at_once * CONTEXT)
        command += ["--parallel", str(at_once), "--ctx-size", context, "--threads", str(threads_for(None))]
    with process(name, command, "tiny") as server:
        yield server


@contextmanager
def transformers_continuous() -> Iterator[Server]:
    with process("transformers, continuous batching", _transformers("--continuous-batching"), str(MODEL)) as server:
        yield server


@contextmanager
def transformers_plain() -> Iterator[Server]:
    with process("transformers", _transformers(), str(MODEL)) as server:
        yield server


def _transformers(*options: str) -> list[str]:
    program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
    settings = ["--port", "{port}", "--device", "cpu", "--dtype", "float32", "--model-timeout", "-1"]
    return [program, "serve", str(MODEL), *settings, *options]


@contextmanager
def process(name: str, command: list[str], model: str) -> Iterator[Server]:
    """A server on a free port, its output in a file that is shown if it does not come up."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as output:
        arguments = [argument.format(port=port) for argument in command]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        running = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment)
        server = Server(name, f"http://127.0.0.1:{port}", model, psutil.Process(running.pid))
        try:
            _until_it_answers(server, running, output)
            yield server
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(40)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def _until_it_answers(server: Server, running: subprocess.Popen[bytes], output: Any) -> None:
    import urllib.error
    import urllib.request

    end = time.monotonic() + 900
    while time.monotonic() < end and running.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/v1/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    output.seek(0)
    raise SystemExit(f"{server.name} did not start:\n{output.read()[-3000:]}")


if __name__ == "__main__":
    main()
