"""Host memory that the GPU copies from and to without a stop, or reads across the link: locked to its pages.

`torch.empty(pin_memory=True)` lets one thread clear the pages, and takes up to twice what was asked for: sizes are
rounded up to powers of two. Here many threads have the kernel clear them, in huge pages where the system has some, the
driver then locks them, and sizes are rounded up to one page.

Memory that was locked once stays so, and mapped, until the process ends, because the driver and the device may know its
addresses for longer than its tensors live. Once the last of them is gone, it serves the next who asks.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from threading import Lock as Mutex
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from whet.errors import WhetError

Kinds = Mapping[str, tuple[torch.Size, torch.dtype]]

ALIGN = 256  # bytes; as the device's own allocator does
PIECE = 32 * 2**20  # bytes that a thread touches at a time: torch's own threads join in from 2**15 elements on
THREADS = 16
LARGEST = 2  # times what is asked for: memory that is used again
FOR_EVERY_CONTEXT, IN_THE_DEVICE_S_ADDRESSES = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped


class Lock(Protocol):
    """What locks pages. Memory is used again for a lock that equals its own."""

    def lock(self, address: int, size: int) -> str | None:
        """Lock `size` bytes. Where they can't be: why."""

    def settle(self) -> bool:
        """Wait until nothing that has begun reads or writes what was locked. False where there can be no waiting."""


@dataclass(frozen=True)
class Cuda:
    """Locks pages for copies to and from `device`, and for its kernels."""

    device: torch.device

    def lock(self, address: int, size: int) -> str | None:
        """Raises RuntimeError where the driver refuses during the recording of a CUDA graph: that, too, has failed."""
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.device):
            recording = torch.cuda.is_current_stream_capturing()
            found = runtime.cudaHostRegister(address, size, FOR_EVERY_CONTEXT | IN_THE_DEVICE_S_ADDRESSES)
            if int(found) == 0:
                return None
            reason = f"CUDA error {int(found)}, {runtime.cudaGetErrorString(found)}"
            if recording:
                raise RuntimeError(f"host memory could not be locked while a CUDA graph is recorded: {reason}")
            with suppress(RuntimeError):  # or the next kernel that anybody launches is blamed
                torch.zeros(1, device=self.device)
            return reason

    def settle(self) -> bool:
        """False while a CUDA graph is recorded. Raises RuntimeError where work on the device has failed."""
        with torch.cuda.device(self.device):
            if torch.cuda.is_current_stream_capturing():
                return False
            torch.cuda.synchronize()
            return True


@dataclass(eq=False)
class _Locked:
    by: Lock
    mapping: mmap.mmap
    holder: ref[memoryview]  # which all tensors over it keep
    process: int = field(default_factory=os.getpid)  # another's is not mapped here

    @property
    def free(self) -> bool:
        return self.holder() is None and self.process == os.getpid()

    def serves(self, length: int, by: Lock) -> bool:
        return self.free and length <= len(self.mapping) <= LARGEST * length and self.by == by


_locked: list[_Locked] = []
_taking = Mutex()


def pinned(size: int, by: Lock) -> Tensor:
    """`size` bytes of any values, [size] in uint8 on the CPU, locked to their pages.

    Once the last tensor over them is gone they may be another's; a CUDA graph does not count as one. A forked process
    does not have them. Raises WhetError where they can't be had.
    """
    length = _rounded(max(size, 1), mmap.PAGESIZE)
    if (spare := _spare(length, by)) is not None:
        return spare[:size]
    try:
        mapping = _mapping(length)
    except OSError as error:
        raise _refused(size, str(error)) from None
    block, holder = _over(mapping)
    _touch(block)
    reason = by.lock(block.data_ptr(), length)
    if reason is not None:
        del block, mapping  # which the error's traceback would keep
        raise _refused(size, reason)
    # One reference too many: else it is unmapped as the interpreter ends, when copies may still run, or in a fork.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))
    _locked.append(_Locked(by, mapping, holder))
    return block[:size]


def spare() -> int:
    """Bytes that stay locked and that nobody has: what the system counts as used, and the next who asks may have."""
    return sum(len(x.mapping) for x in _locked if x.free)


def _spare(length: int, by: Lock) -> Tensor | None:
    """The smallest memory that nobody has and that serves."""
    with _taking:
        spares = [x for x in _locked if x.serves(length, by)]
        if not spares or not by.settle():
            return None
        least = min(spares, key=lambda x: len(x.mapping))
        block, least.holder = _over(least.mapping)
        return block


def _over(mapping: mmap.mmap) -> tuple[Tensor, ref[memoryview]]:
    holder = memoryview(mapping)
    return torch.frombuffer(holder, dtype=torch.uint8), ref(holder)


def mapped(x: Tensor, device: torch.device) -> Tensor:
    """A pinned tensor as one on the device, over the same bytes: kernels read and write them across the link.

    x: contiguous, of any shape and type. The result keeps the bytes. Raises ValueError for any other tensor, and where
    `device` is not the one for which they were locked.
    """
    if not x.is_contiguous() or not x.is_pinned():
        raise ValueError("only a contiguous tensor in pinned memory can be read by kernels where it is")
    if not x.numel():
        return torch.empty(x.shape, dtype=x.dtype, device=device)
    found = torch.as_tensor(_Bytes(x), device=device)
    if found.data_ptr() != x.data_ptr():
        raise ValueError(f"these bytes were pinned for another device than {device}")
    return found.view(x.dtype).view(x.shape)


class _Bytes:
    """A tensor's bytes, as arrays on a GPU introduce themselves to each other, in version 3 of that protocol."""

    def __init__(self, x: Tensor):
        self.x = x.detach()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        size = self.x.numel() * self.x.element_size()
        return {"shape": (size,), "typestr": "|u1", "data": (self.x.data_ptr(), False), "version": 3}


def room(kinds: Kinds) -> int:
    """Bytes of a block for tensors of these shapes and types, each at a multiple of `ALIGN`."""
    return sum(_rounded(prod(shape) * dtype.itemsize, ALIGN) for shape, dtype in kinds.values())


def cut(block: Tensor, kinds: Kinds) -> dict[str, Tensor]:
    """Tensors of these shapes and types, one behind the other in a block [n] in uint8 that has room for them."""
    found, start = {}, 0
    for name, (shape, dtype) in kinds.items():
        size = prod(shape) * dtype.itemsize
        found[name] = block[start : start + size].view(dtype).view(shape)
        start += _rounded(size, ALIGN)
    return found


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _mapping(length: int) -> mmap.mmap:
    """Raises OSError where the system has no such room."""
    if sys.platform == "win32":
        return mmap.mmap(-1, length)
    mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        # Or after a fork the first write moves this process to other pages than those that are locked.
        mapping.madvise(mmap.MADV_DONTFORK)
    return mapping


def _touch(block: Tensor) -> None:
    """Have the kernel give the block its pages: one write to each."""
    pieces = [piece[:: mmap.PAGESIZE] for piece in torch.split(block, PIECE)]
    threads = min(THREADS, len(pieces), _processors())
    if threads == 1:
        for piece in pieces:
            piece.zero_()
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(torch.Tensor.zero_, pieces))  # lets the other threads run meanwhile


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _refused(size: int, reason: str) -> WhetError:
    return WhetError(
        f"{size / 2**30:.2f} GiB could not be locked for the GPU ({reason})",
        where="host memory",
        fix="let this process lock more (`ulimit -l`, the container's memory), or keep less in host memory: "
        "use_gradient_checkpointing=True, a smaller max_seq_length, or fewer rows at a time",
    )
