"""Memory that this process holds, read without waiting for the GPU."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Memory:
    """Bytes. On a GPU: what PyTorch's allocator has reserved, of the card's. Else resident memory; no total."""

    used: int
    total: int | None = None


def memory() -> Memory:
    """What is held now. The allocator counts on the host, so reading it never makes the GPU wait."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        stats = torch.cuda.memory_stats_as_nested_dict()  # memory_stats() flattens it, at ten times the cost
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Memory(int(stats["reserved_bytes"]["all"]["current"]), total)
    return Memory(_resident())


def _resident() -> int:
    """Resident memory now; where the system has no /proc, the most it has been."""
    try:
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
