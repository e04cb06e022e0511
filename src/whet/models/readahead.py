"""Reads tensors of safetensors files ahead of who asks for them, onto a GPU, by several threads.

The threads read pieces of the files into pinned buffers, which the GPU copies from. This process's memory does not grow
by the pages of the files.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whet.errors import WhetError
from whet.models.pinned import Cuda, pinned

log = logging.getLogger("whet")

CHUNK = 16 * 2**20  # bytes of one read and one copy; each thread has two such buffers
THREADS = 6
AHEAD = 512 * 2**20  # bytes on the GPU that nobody has asked for yet
LARGEST = 8 * 2**30  # a tensor above it may be bound for the CPU: transformers reads it
WORDS = {"U": "uint", "I": "int", "F": "float"}
NAMES = {f"{letter}{bits}": f"{word}{bits}" for letter, word in WORDS.items() for bits in (8, 16, 32, 64)}
NAMES |= {"BOOL": "bool", "BF16": "bfloat16", "C64": "complex64"}
NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
DTYPES = {name: getattr(torch, dtype) for name, dtype in NAMES.items() if hasattr(torch, dtype)}


class Host:
    """What the reader needs of a device, for one where a copy has ended when it returns: the CPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def queue(self) -> Any:
        """Where one thread's copies wait for each other."""
        return None

    def empty(self, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Any]:
        """A new tensor, and what copies into it must wait for: its memory may still be in use by queued kernels."""
        return torch.empty(shape, dtype=dtype, device=self.device), None

    def copy(self, source: Tensor, to: Tensor, queue: Any, after: Any) -> Any:
        """Begin a copy; what ends with it."""
        to.copy_(source)

    def end(self, what: Any) -> None:
        """Wait for a copy, or for all in a queue."""

    def follow(self, x: Tensor, copies: list[Any]) -> None:
        """Have all that the calling thread queues from now on wait for the copies into x."""


class Gpu(Host):
    """Allocates on the stream that is the current one now."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.stream = torch.cuda.current_stream(device)

    def buffer(self, size: int) -> Tensor:
        try:
            return pinned(size, Cuda(self.device))
        except WhetError as error:
            log.info("the weights are read through pageable memory: %s", error.what)
            return super().buffer(size)

    def queue(self) -> Any:
        return torch.cuda.Stream(self.device)

    def empty(self, shape: list[int], dtype: torch.dtype) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self.stream):
            return super().empty(shape, dtype)[0], self.stream.record_event()

    def copy(self, source: Tensor, to: Tensor, queue: Any, after: Any) -> Any:
        queue.wait_event(after)
        with torch.cuda.stream(queue):
            to.copy_(source, non_blocking=True)
            return queue.record_event()

    def end(self, what: Any) -> None:
        what.synchronize()

    def follow(self, x: Tensor, copies: list[Any]) -> None:
        stream = torch.cuda.current_stream(self.device)
        for copy in copies:
            stream.wait_event(copy)
        if stream != self.stream:
            x.record_stream(stream)


@dataclass(eq=False)
class _Stored:
    """A tensor in a file, as safetensors' own slices are; `[...]` gives it on the device."""

    name: str
    reader: Reader
    slice: Any  # safetensors' own
    file: BinaryIO
    start: int
    size: int  # bytes
    begun: bool = False

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.get(self) if index is Ellipsis else self.slice[index]

    def get_shape(self) -> list[int]:
        return self.slice.get_shape()

    def get_dtype(self) -> str:
        return self.slice.get_dtype()

    def read(self, start: int, into: Tensor) -> None:
        """Raises SafetensorError where the file has become shorter since it was opened."""
        left, at = memoryview(into.numpy()), self.start + start
        while left:
            count = os.preadv(self.file.fileno(), [left], at)
            if count == 0:
                raise SafetensorError(f"{self.file.name} was cut short while it was read: it ends within {self.name}")
            left, at = left[count:], at + count


@dataclass(eq=False)
class _Job:
    """One reading of a tensor."""

    stored: _Stored
    tensor: Tensor | None = None
    after: Any = None
    left: int = 0  # chunks whose copy has not begun
    copies: list[Any] = field(default_factory=list)
    error: BaseException | None = None


class _Copier:
    """What one thread copies with: two buffers in turn, so that one is read into while the other is copied from."""

    def __init__(self, device: Host, chunk: int):
        self.device, self.chunk = device, chunk
        self.buffers: deque[tuple[Tensor, Any]] = deque()

    def copy(self, job: _Job, start: int, end: int) -> None:
        if not self.buffers:
            self.queue = self.device.queue()
            self.buffers.extend((x, None) for x in self.device.buffer(2 * self.chunk).split(self.chunk))
        buffer, copied = self.buffers[0]
        if copied is not None:
            self.device.end(copied)
        job.stored.read(start, buffer[: end - start])
        to = job.tensor.view(-1).view(torch.uint8)[start:end]
        copied = self.device.copy(buffer[: end - start], to, self.queue, job.after)
        self.buffers[0] = buffer, copied
        self.buffers.rotate()
        job.copies.append(copied)

    def end(self) -> None:
        if self.buffers:
            self.device.end(self.queue)


class Reader:
    """Reads the tensors of files ahead, in natural order of their names, from the first one that is asked for.

    One that is asked for before its turn, or again, comes next. No thread outlives the `with`, and no copy.
    """

    def __init__(self, device: Host):
        self.device = device
        self.tensors: dict[str, Any] = {}
        self.files = ExitStack()
        self.changed = Condition()  # guards all below
        self.threads: list[Thread] = []
        self.order: deque[_Stored] = deque()
        self.chunks: deque[tuple[_Job, int, int]] = deque()  # of tensors that were begun
        self.ahead: dict[_Stored, _Job] = {}  # begun, and nobody has asked for them yet
        self.bytes_ahead = 0
        self.held: set[_Job] = set()  # whose memory must stay until their copies have ended
        self.closed = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        for job in self.held:
            job.tensor = None  # which an error's traceback may keep
        for kept in (self.held, self.ahead, self.chunks, self.order, self.tensors):
            kept.clear()
        self.files.close()

    def open(self, path: str) -> None:
        """Add a file's tensors. Raises what `safe_open` raises."""
        checked = self.files.enter_context(safe_open(path, framework="pt", device="cpu"))
        file = self.files.enter_context(Path(path).open("rb", buffering=0))  # noqa: SIM115
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in checked.keys():  # noqa: SIM118
            start, end = header[name]["data_offsets"]
            plain = checked.get_slice(name)
            ours = header[name]["dtype"] in DTYPES and end - start <= LARGEST
            self.tensors[name] = _Stored(name, self, plain, file, 8 + length + start, end - start) if ours else plain

    def get(self, stored: _Stored) -> Tensor:
        """A tensor on the device, for the calling thread's current stream."""
        with self.changed:
            self._start()
            job = self.ahead.pop(stored, None)
            if job is None:
                job = self._begin(stored)
            else:
                self.bytes_ahead -= stored.size
            self.changed.notify_all()
            self.changed.wait_for(lambda: not job.left or self.closed)
            if job.error is not None:
                raise job.error
            if self.closed:
                raise RuntimeError("the files of the weights are closed")
            self.device.follow(job.tensor, job.copies)
            self.held.discard(job)
            return job.tensor

    def _start(self) -> None:
        if self.threads or self.closed:
            return
        mine = [x for x in self.tensors.values() if isinstance(x, _Stored)]
        self.order = deque(sorted(mine, key=lambda x: natural(x.name)))
        self.chunk = min(CHUNK, max([1, *(x.size for x in mine)]))
        chunks = -(-sum(x.size for x in mine) // self.chunk)
        for _ in range(max(1, min(THREADS, os.cpu_count() or 1, chunks))):
            thread = Thread(target=self._work, name="whet-weights")
            thread.start()
            self.threads.append(thread)

    def _work(self) -> None:
        copier = _Copier(self.device, self.chunk)
        while self._step(copier):  # whose end lets go of the tensor
            pass
        copier.end()

    def _step(self, copier: _Copier) -> bool:
        """Copy the next chunk, once there is one. False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self._begin_ahead())
            if self.closed:
                return False
            job, start, end = self.chunks.popleft()
        try:
            copier.copy(job, start, end)
        except BaseException as error:  # for the thread that asks
            job.error = error
        with self.changed:
            job.left -= 1
            self.changed.notify_all()
        return True

    def _begin_ahead(self) -> bool:
        """Whether there are chunks to read, after tensors were begun whose turn it is and for which there is room."""
        while not self.chunks and self.order:
            stored = self.order[0]
            if not stored.begun:
                if self.bytes_ahead and self.bytes_ahead + stored.size > AHEAD:
                    break
                self.ahead[stored] = self._begin(stored)
                self.bytes_ahead += stored.size
                self.changed.notify_all()
            self.order.popleft()
        return bool(self.chunks)

    def _begin(self, stored: _Stored) -> _Job:
        """Have a tensor read next."""
        job, size = _Job(stored), stored.size
        stored.begun = True
        if self.closed:
            return job
        try:
            job.tensor, job.after = self.device.empty(stored.get_shape(), DTYPES[stored.get_dtype()])
        except Exception as error:  # no memory
            job.error = error
            return job
        pieces = [(job, start, min(start + self.chunk, size)) for start in range(0, size, self.chunk)]
        job.left = len(pieces)
        self.chunks.extendleft(reversed(pieces))
        self.held.add(job)
        return job


def natural(name: str) -> list[tuple[bool, str, int]]:
    """Sorts numbers between dots, and those at the end of words, by their value, as transformers does."""
    words = [(x, x.rstrip("0123456789")) for x in name.split(".")]
    return [(word != "", word, int(x[len(word) :] or -1)) for x, word in words]
