"""The default stream of a GPU, where bitsandbytes quantizes and updates whatever the current stream is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def on_default_stream(devices: Iterable[torch.device]) -> Iterator[None]:
    """Work on the default stream of the GPUs among `devices`: after what the current ones hold, and before more."""
    pairs = [(torch.cuda.current_stream(d), torch.cuda.default_stream(d)) for d in devices if d.type == "cuda"]
    pairs = [(current, default) for current, default in pairs if current != default]
    with ExitStack() as stack:
        for current, default in pairs:
            default.wait_stream(current)
            stack.enter_context(torch.cuda.stream(default))
        yield
    for current, default in pairs:
        current.wait_stream(default)
