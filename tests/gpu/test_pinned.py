"""Page-locked memory on a GPU: copies that the host does not wait for, kernels that read it, and its next use."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from whet.models.activations import HostMemory
from whet.models.pinned import Cuda, cut, mapped, pinned

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda", 0)
LONG = 200_000_000  # cycles: a tenth of a second, more than the host needs for a launch


class Own(Cuda):
    """The driver's lock, whose memory serves no other."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def in_a_process_of_its_own(code: str) -> str:
    """What it says on stderr."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def table(lock: Cuda, rows: int = 1000, width: int = 72, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random values [rows, width] in pinned memory, behind others in the same block."""
    kinds = {"before": (torch.Size([3]), torch.uint8), "table": (torch.Size([rows, width]), dtype)}
    x = cut(pinned(256 + 256 * rows * width, lock), kinds)["table"]
    x.copy_(torch.randn(rows, width) if dtype.is_floating_point else torch.randint(0, 255, (rows, width)))
    return x


@pytest.mark.parametrize("size", [1, 4097, 200 * 2**20 + 1])
def test_copies_to_and_from_it_are_right_and_the_host_does_not_wait(size: int) -> None:
    """Catches pages that are not locked: the first, the last, or all."""
    block = pinned(size, Cuda(DEVICE))
    assert block.is_pinned()
    assert block[-1:].is_pinned()
    there = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    back, copied = torch.empty_like(there), torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    block.copy_(there, non_blocking=True)
    back.copy_(block, non_blocking=True)
    copied.record()
    assert not copied.query(), "the host has waited"
    copied.synchronize()
    assert torch.equal(block, there.cpu())
    assert torch.equal(back, there)


def test_it_is_used_again_only_once_no_copy_runs() -> None:
    """Catches a copy that writes into what another has."""
    lock = Own(DEVICE)
    block, x = pinned(2**20, lock), torch.ones(2**20, dtype=torch.uint8, device=DEVICE)
    copied = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    block.copy_(x, non_blocking=True)
    copied.record()
    assert not copied.query()
    address = block.data_ptr()
    del block
    assert not copied.query(), "nobody has asked for it"
    again = pinned(2**20, lock)
    assert copied.query()
    assert again.data_ptr() == address
    again.copy_(x * 2, non_blocking=True)
    torch.cuda.synchronize()
    assert again.is_pinned()
    assert bool((again == 2).all())


def test_what_the_driver_refuses_is_said_and_forgotten() -> None:
    """Catches a failure that is blamed on the next kernel."""
    block = pinned(2**20, Cuda(DEVICE))
    reason = Cuda(DEVICE).lock(block.data_ptr(), 2**20)
    assert reason is not None
    assert "already" in reason
    assert torch.ones(5, device=DEVICE).sum().item() == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn])
def test_a_mapped_tensor_is_the_pinned_one(dtype: torch.dtype) -> None:
    """Catches a copy in the device's memory, and a view that starts at the block's first byte."""
    x = table(Cuda(DEVICE), dtype=dtype)
    torch.ones(1, device=DEVICE)
    before = torch.cuda.memory_allocated()
    found = mapped(x, DEVICE)
    assert torch.cuda.memory_allocated() == before
    assert (found.shape, found.dtype, found.device, found.data_ptr()) == (x.shape, dtype, DEVICE, x.data_ptr())
    for copy in (found.cpu(), found.clone().cpu()):
        assert torch.equal(copy.view(torch.uint8), x.view(torch.uint8))
    found.view(torch.uint8)[-1, -1] = 9
    torch.cuda.synchronize()
    assert x.view(torch.uint8)[-1, -1] == 9


def test_an_embedding_reads_its_rows_across_the_link() -> None:
    x = table(Cuda(DEVICE))
    ids = torch.randint(0, len(x), (3, 50))
    got = F.embedding(ids.to(DEVICE), mapped(x, DEVICE))
    assert torch.equal(got.cpu(), F.embedding(ids, x))


def test_a_mapped_tensor_keeps_the_memory() -> None:
    """Catches a tensor over what another has, and memory that is never used again."""
    lock = Own(DEVICE)
    x = table(lock)
    start, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
    expected, found = x.clone(), mapped(x, DEVICE)
    view = found[5:].t()
    del x, found
    gc.collect()
    other = pinned(size, lock).fill_(0)
    assert other.data_ptr() != start
    assert torch.equal(view.t().cpu(), expected[5:])
    del view
    gc.collect()
    assert pinned(size, lock).data_ptr() == start


def test_a_mapped_tensor_is_a_module_s_like_any_other() -> None:
    x = table(Cuda(DEVICE))
    embedding = nn.Embedding.from_pretrained(mapped(x, DEVICE), freeze=True)
    state = embedding.state_dict()
    assert state["weight"].data_ptr() == x.data_ptr()
    other = nn.Embedding(*x.shape, dtype=x.dtype)
    other.load_state_dict(state)
    assert torch.equal(other.weight, x)
    assert torch.equal(embedding.cpu().weight, x)


def test_a_recorded_kernel_reads_what_is_there_when_it_is_replayed() -> None:
    """Catches a copy made while recording."""
    x, ids = table(Cuda(DEVICE)), torch.tensor([3, 1, 999], device=DEVICE)
    weight = mapped(x, DEVICE)
    F.embedding(ids, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = F.embedding(ids, weight)
    for value in (1, 2):
        x.fill_(value)
        graph.replay()
        assert bool((got == value).all())


def test_an_empty_tensor_and_one_that_is_not_pinned() -> None:
    assert mapped(pinned(0, Cuda(DEVICE)).view(0, 4), DEVICE).shape == (0, 4)
    with pytest.raises(ValueError, match="pinned memory"):
        mapped(torch.zeros(3), DEVICE)


def test_memory_let_go_while_a_graph_is_recorded_waits_for_its_end() -> None:
    """Catches a wait for the device that ends the recording."""
    lock = Own(DEVICE)
    block, x = pinned(2**20, lock), torch.ones(5, device=DEVICE)
    address, graph = block.data_ptr(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        got = x + 1
        del block
        settled = lock.settle()
    assert not settled
    graph.replay()
    assert got.sum().item() == 10
    assert pinned(2**20, lock).data_ptr() == address


def test_memory_made_while_a_graph_is_recorded_is_right_or_ends_the_recording_alone() -> None:
    """PassGraph takes a RuntimeError for a recording that failed. Catches one that ends training."""
    in_a_process_of_its_own("""
        import torch
        from whet.models.pinned import Cuda, pinned

        device = torch.device("cuda", 0)
        x, graph = torch.full((1000,), 7, dtype=torch.uint8, device=device), torch.cuda.CUDAGraph()
        spare = pinned(1000, Cuda(device)).data_ptr()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                block = pinned(1000, Cuda(device))
                block.copy_(x, non_blocking=True)
        except RuntimeError:
            assert torch.ones(5, device=device).sum().item() == 5
        else:
            assert block.data_ptr() != spare
            graph.replay()
            torch.cuda.synchronize()
            assert bool((block == 7).all())
    """)


def test_values_of_a_layer_wait_in_one_pinned_block() -> None:
    """Catches values that a copy overtakes, and blocks that are not used again."""
    memory = HostMemory(DEVICE)
    blocks = []
    for tokens in (4000, 3000):
        expected = [torch.randn(tokens, 512, device=DEVICE) for _ in range(6)]
        parked = []
        for x in expected:
            h, lse = x * 2, x[:, 0].contiguous()
            parked.append(memory.park({"h": h, "lse": lse}))
            del h, lse
        blocks.append({p.host["h"].untyped_storage().data_ptr() for p in parked})
        for p, x in zip(reversed(parked), reversed(expected), strict=True):
            assert p.host["h"].is_pinned()
            assert p.host["lse"].untyped_storage().data_ptr() == p.host["h"].untyped_storage().data_ptr()
            values = memory.fetch(p)
            assert torch.equal(values["h"], x * 2)
            assert torch.equal(values["lse"], x[:, 0])
        del parked, p
    assert len(blocks[0]) == 6
    assert blocks[1] == blocks[0]


def test_nothing_is_said_when_the_interpreter_ends_under_a_copy() -> None:
    said = in_a_process_of_its_own(f"""
        import torch
        from whet.models.pinned import Cuda, mapped, pinned

        block, spare = (pinned(2**24, Cuda(torch.device("cuda", 0))) for _ in range(2))
        weight = mapped(block, torch.device("cuda", 0))
        x = torch.ones(2**24, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep({LONG})
        block.copy_(x, non_blocking=True)
        spare.copy_(x, non_blocking=True)
        del spare
    """)
    assert "Exception" not in said
    assert "rror" not in said
