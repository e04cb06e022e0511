"""Page-locked memory: how it is cut, when it is used again, and what is said where it can't be had.

Here a lock only notes what it was asked; the driver's own is tested on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whet.errors import WhetError
from whet.models import pinned as module
from whet.models.pinned import ALIGN, _Bytes, cut, mapped, pinned, room, spare

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


PIECE = 16 * mmap.PAGESIZE


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests lock stays."""
    monkeypatch.setattr(module, "PIECE", PIECE)


@dataclass(eq=False)
class Noted:
    """A lock of no pages, and what was asked of it. Each has memory of its own."""

    refuses: str | None = None
    ready: bool = True
    locked: dict[int, int] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    settled: int = 0

    def lock(self, address: int, size: int) -> str | None:
        self.asked.append(address)
        if self.refuses is None:
            self.locked[address] = size
        return self.refuses

    def settle(self) -> bool:
        self.settled += self.ready
        return self.ready


DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn]
KINDS = st.dictionaries(
    st.text("abc", max_size=3),
    st.tuples(st.lists(st.integers(0, 7), max_size=3).map(torch.Size), st.sampled_from(DTYPES)),
    max_size=6,
)


@given(KINDS)
def test_tensors_lie_apart_and_aligned_and_fill_the_block(kinds: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Catches an overlap, an offset that a kernel's vector loads can't have, and room for less than is cut."""
    block = torch.zeros(room(kinds), dtype=torch.uint8)
    found = cut(block, kinds)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == kinds
    covered = torch.zeros_like(block)
    for x in found.values():
        assert x.is_contiguous()
        if x.numel():
            start, size = x.data_ptr() - block.data_ptr(), x.numel() * x.element_size()
            assert start % ALIGN == 0
            covered[start : start + size] += 1
    assert int(covered.sum()) == sum(x.numel() * x.element_size() for x in found.values())
    assert not covered.numel() or int(covered.max()) <= 1
    for i, x in enumerate(found.values()):
        x.view(torch.uint8).fill_(i + 1) if x.dim() else x.fill_(i % 2)
    for i, x in enumerate(found.values()):
        assert bool((x.view(torch.uint8) == i + 1).all()) if x.dim() else x.item() == i % 2


@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 5 * 2**20 + 7, 3 * PIECE + 1])
def test_a_block_has_the_size_that_was_asked_for(size: int) -> None:
    """Catches sizes rounded up to powers of two, and a last page that is not locked."""
    lock = Noted()
    block = pinned(size, lock)
    assert block.shape == (size,)
    assert block.dtype == torch.uint8
    (locked,) = lock.locked.values()
    assert size <= locked < size + mmap.PAGESIZE or (size, locked) == (0, mmap.PAGESIZE)
    block.fill_(7)
    assert bool((block == 7).all())


@linux
@pytest.mark.parametrize("threads", [1, 4])
def test_every_page_is_there_before_it_is_locked(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pages left for the driver to make, one at a time: those of a thread, or of the last piece."""
    resident: list[int] = []

    class Counting(Noted):
        def lock(self, address: int, size: int) -> str | None:
            resident.append(resident_of(address, size))
            return super().lock(address, size)

    monkeypatch.setattr(module, "_processors", lambda: threads)
    size = 3 * PIECE + 5 * mmap.PAGESIZE
    block = pinned(size, Counting())
    assert resident == [size]
    del block


def resident_of(address: int, size: int) -> int:
    """Bytes in memory of those at an address."""
    pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("size", [1, 3 * PIECE + 1])
def test_memory_is_used_again_once_the_last_tensor_over_it_is_gone(size: int) -> None:
    """Catches memory that two have, that is locked twice, or that a thread keeps which touched it."""
    lock = Noted()
    block = pinned(size, lock).fill_(5)
    address = block.data_ptr()
    view = block[:1].view(torch.int8)
    storage = view.untyped_storage()
    del block, view
    assert pinned(size, lock).data_ptr() != address
    assert bytes(storage[:size]) == b"\5" * size
    del storage
    again = {pinned(size, lock).data_ptr() for _ in range(3)}
    assert again <= set(lock.asked)
    held = [pinned(size, lock), pinned(size, lock)]
    assert {x.data_ptr() for x in held} == set(lock.asked)
    assert len(lock.asked) == 2
    assert held[0].shape == (size,)


def test_what_nobody_has_is_counted() -> None:
    """Catches a plan that thinks less host memory can be had than there is, after an earlier training."""
    lock, before = Noted(), spare()
    block = pinned(3 * mmap.PAGESIZE, lock)
    assert spare() == before
    del block
    assert spare() == before + 3 * mmap.PAGESIZE
    taken = pinned(2 * mmap.PAGESIZE, lock)
    assert spare() == before
    assert len(taken) == 2 * mmap.PAGESIZE


def test_the_last_tensor_may_go_in_another_thread_or_in_a_cycle() -> None:
    lock = Noted()
    held: list[Any] = [pinned(1, lock), pinned(1, lock)]
    addresses = [x.data_ptr() for x in held]
    thread = threading.Thread(target=held.pop)
    thread.start()
    thread.join()
    kept = pinned(1, lock)
    assert kept.data_ptr() == addresses[1]
    held.append(held)
    del held
    gc.collect()
    assert pinned(1, lock).data_ptr() == addresses[0]


def test_threads_that_ask_at_once_share_nothing() -> None:

    class Slow(Noted):
        def settle(self) -> bool:
            time.sleep(0.01)  # the other threads run meanwhile
            return True

    lock, found = Slow(), list[torch.Tensor]()
    spares = [pinned(1, lock) for _ in range(4)]
    del spares
    threads = [threading.Thread(target=lambda: found.append(pinned(1, lock))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({x.data_ptr() for x in found}) == 8
    assert len(lock.asked) == 8


def test_nothing_is_used_again_before_the_device_is_done_with_it() -> None:
    """Where there is no waiting, as while a CUDA graph is recorded, new memory is locked."""
    lock = Noted()
    first = pinned(1, lock).data_ptr()
    assert lock.settled == 0, "there was nothing to wait for"
    lock.ready = False
    other = pinned(1, lock)
    assert lock.asked == [first, other.data_ptr()]
    lock.ready = True
    assert pinned(1, lock).data_ptr() == first
    assert lock.settled == 1


def test_a_device_that_has_failed_is_heard_of_and_nothing_is_lost() -> None:
    class Failed(Noted):
        def settle(self) -> bool:
            if not self.ready:
                raise RuntimeError("device-side assert")
            return True

    lock = Failed()
    first = pinned(1, lock).data_ptr()
    lock.ready = False
    with pytest.raises(RuntimeError, match="device-side assert"):
        pinned(1, lock)
    lock.ready = True
    assert pinned(1, lock).data_ptr() == first


def test_memory_serves_its_own_lock_and_up_to_half_its_size() -> None:
    """Catches memory of another device, too little of it, and a page that takes a gigabyte."""
    lock, page = Noted(), mmap.PAGESIZE
    sizes = [8 * page, 4 * page, 6 * page]
    held = [pinned(size, lock) for size in sizes]
    addresses = dict(zip(sizes, (x.data_ptr() for x in held), strict=True))
    del held
    assert pinned(4 * page, Noted()).data_ptr() not in addresses.values()
    for size, serving in ((4, 4), (3, 4), (2, 4), (5, 6), (7, 8), (8, 8)):
        assert pinned(size * page - 1, lock).data_ptr() == addresses[serving * page]
    assert len(lock.asked) == 3
    for size in (1, 9):
        assert pinned(size * page, lock).data_ptr() not in addresses.values()
    assert len(lock.asked) == 5


@linux
def test_what_was_locked_is_never_unmapped() -> None:
    """Not even when modules are taken down, as the interpreter ends. Catches copies to memory that is gone."""
    address = pinned(1, Noted()).data_ptr()
    assert module._locked.pop().holder() is None
    gc.collect()
    assert is_mapped(address)


@linux
@pytest.mark.parametrize("size", [1, 3 * PIECE])
def test_memory_that_can_t_be_locked_is_given_back_and_said(size: int) -> None:
    """Catches memory that the error's traceback holds, or that another gets without a lock."""
    lock = Noted(refuses="CUDA error 2, out of memory")
    with pytest.raises(WhetError) as caught:
        pinned(size, lock)
    (address,) = lock.asked
    assert not is_mapped(address)
    lock.refuses = None
    pinned(size, lock)
    assert len(lock.asked) == 2
    assert caught.value.what == f"{size / 2**30:.2f} GiB could not be locked for the GPU (CUDA error 2, out of memory)"
    assert caught.value.fix is not None
    assert "ulimit -l" in caught.value.fix
    assert "use_gradient_checkpointing=True" in caught.value.fix


@linux
def test_more_than_there_are_addresses_for_is_said() -> None:
    lock = Noted()
    with pytest.raises(WhetError, match=r"1073741824\.00 GiB could not be locked"):
        pinned(2**60, lock)
    assert not lock.asked


@linux
def test_a_forked_process_has_neither_the_memory_nor_what_is_spare() -> None:
    """As a data loader's workers. Catches pages that move when written to after a fork, and writes to unmapped ones."""
    lock = Noted()
    block, other = pinned(3 * mmap.PAGESIZE, lock), pinned(3 * mmap.PAGESIZE, lock)
    addresses = [block.data_ptr(), other.data_ptr()]
    del other
    child = os.fork()
    if child == 0:
        gone = not any(is_mapped(x) for x in addresses)
        del block
        own = [pinned(3 * mmap.PAGESIZE, lock).fill_(1) for _ in range(3)]
        os._exit(0 if gone and len(own) == 3 and len(lock.asked) == 5 and not lock.settled else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    block.fill_(3)
    del block
    assert {x.data_ptr() for x in [pinned(3 * mmap.PAGESIZE, lock), pinned(3 * mmap.PAGESIZE, lock)]} == set(addresses)


@pytest.mark.parametrize("kept", ["module", "cycle"])
def test_nothing_is_said_or_done_when_the_interpreter_ends(kept: str) -> None:
    """Catches calls of a driver that has shut down."""
    code = """
        import sys
        from whet.models.pinned import pinned

        class Loud:
            def lock(self, address, size):
                return None

            def settle(self):
                print("settled", file=sys.stderr)
                return True

        block = pinned(5000, Loud())
        pinned(5000, Loud())
    """
    code = textwrap.dedent(code) + (
        "class Ring: pass\nring = Ring()\nring.itself, ring.block = ring, block\n" * (kept == "cycle")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "settled" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("x", [torch.zeros(4), torch.zeros(4, 4).t()])
def test_only_pinned_tensors_are_mapped(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous tensor in pinned memory"):
        mapped(x, torch.device("cuda"))


def test_an_array_of_bytes_tells_where_they_lie_and_keeps_them() -> None:
    """Catches an address that leaves out the view's offset, a size in elements, and memory given away too early."""
    lock = Noted()
    block = pinned(4096, lock)
    shown = _Bytes(cut(block, {"a": (torch.Size([3]), torch.uint8), "b": (torch.Size([5, 2]), torch.bfloat16)})["b"])
    address = block.data_ptr() + ALIGN
    del block
    assert shown.__cuda_array_interface__ == {
        "shape": (20,),
        "typestr": "|u1",
        "data": (address, False),
        "version": 3,
    }
    assert pinned(4096, lock).data_ptr() != address - ALIGN
    del shown
    assert address - ALIGN in {x.data_ptr() for x in [pinned(4096, lock), pinned(4096, lock)]}
