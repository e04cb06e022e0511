"""Whether layers ran in the fused block, counted: what is measured as whet's must not be transformers' own layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class NotFused(RuntimeError):
    """A layer ran as transformers wrote it, or in another way than was asked for."""


@dataclass
class Passes:
    """Forward passes of layers in the fused block: all, and those in FP8."""

    fused: int = 0
    fp8: int = 0


@contextmanager
def counted() -> Iterator[Passes]:
    """Counts within."""
    from whet.models import fused

    passes, run = Passes(), fused.run

    def counted_run(block: Any, *args: Any) -> Any:
        passes.fused += 1
        passes.fp8 += block.fp8
        return run(block, *args)

    fused.run = counted_run
    try:
        yield passes
    finally:
        fused.run = run


def check(passes: Passes, model: Any, forwards: int, *, fp8: bool = False) -> None:
    """Raises NotFused unless every layer ran in the block in each of `forwards` passes, in FP8 or not as `fp8` says."""
    from whet.models import fused

    expected = forwards * model.config.get_text_config().num_hidden_layers
    if (passes.fused, passes.fp8) == (expected, expected if fp8 else 0):
        return
    shared = fused.shared_of(model)
    why = "no layer is a fused one" if shared is None else "; ".join(sorted(shared.said)) or "no reason given"
    raise NotFused(
        f"{passes.fused} of {expected} layer passes ran in the fused block, {passes.fp8} in FP8, "
        f"which was {'' if fp8 else 'not '}asked for ({why})"
    )
