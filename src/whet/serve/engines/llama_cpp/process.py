"""The node process that runs llama.cpp: started once, spoken to in JSON lines, gone when its stdin closes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import deque
from pathlib import Path
from typing import Any

from whet.errors import WhetError
from whet.export import llama_cpp
from whet.serve.interface import EngineDown

SCRIPT = Path(__file__).with_name("node.mjs")
LINE = 64 << 20  # bytes: the longest line, which holds a chat template
TOLD = 12  # lines of stderr that an error shows
PATIENCE = 5.0  # seconds to end by itself

Message = dict[str, Any]


class NodeProcess:
    """A running process. `ready`: what it says of the model. Answers come into a queue each, by the order's id."""

    def __init__(self, process: asyncio.subprocess.Process):
        self._process = process
        self._answers: dict[int, asyncio.Queue[Message | EngineDown]] = {}
        self._ids = itertools.count(1)
        self._said: deque[str] = deque(maxlen=TOLD)
        self.ready: Message = {}
        self._listening = asyncio.create_task(self._listen_to_errors())
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, settings: Message) -> NodeProcess:
        """Load the model that `settings` name. Raises WhetError where it can't be, with llama.cpp's own words."""
        threads = llama_cpp.threads_for(settings.get("threads"))
        settings = {**settings, "packages": str(llama_cpp.packages()), "threads": threads}
        pipe = asyncio.subprocess.PIPE
        self = cls(
            await asyncio.create_subprocess_exec(
                "node", str(SCRIPT), json.dumps(settings),
                stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE,
                env=llama_cpp.environment(),
            )
        )  # fmt: skip
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self.stop()
            raise WhetError(f"llama.cpp can't load it:\n{self._last_words()}", where=str(settings["gguf"]))
        self.ready = json.loads(line)["ready"]
        self._reading = asyncio.create_task(self._read())
        return self

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and self._reading is not None and not self._reading.done()

    def order(self, order: Message) -> tuple[int, asyncio.Queue[Message | EngineDown]]:
        """Send an order for an answer; its id, and the queue that its messages come into."""
        number = next(self._ids)
        queue = self._answers[number] = asyncio.Queue()
        self._send({"generate": number, **order})
        return number, queue

    def cancel(self, number: int) -> None:
        """Free the answer's sequence at its next token; nothing to do for one that has ended."""
        if self._answers.pop(number, None) is not None and self.alive:
            self._send({"cancel": number})

    async def stop(self) -> None:
        """Close its stdin, which ends it; kill it when that takes too long."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), PATIENCE)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(self._listening, *([self._reading] if self._reading else []))

    def _send(self, message: Message) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _read(self) -> None:
        """Hand messages to their queues until the process ends; then tell all that wait that it has."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            if (queue := self._answers.get(message["id"])) is not None:
                queue.put_nowait(message)
        code = await self._process.wait()
        await self._listening
        for queue in self._answers.values():
            queue.put_nowait(EngineDown(f"llama.cpp ended (exit code {code}): {self._last_words()}"))

    async def _listen_to_errors(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self._said.append(line.decode(errors="replace").rstrip())

    def _last_words(self) -> str:
        return "\n".join(self._said) or "it said nothing"
