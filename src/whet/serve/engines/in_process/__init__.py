"""Models of transformers in the server's own process, with continuous batching.

    engine = open_engine("merged", adapters={"support": "runs/support/adapter"})
    await engine.start()
    async for piece in engine.generate(Request("merged", Sampling(max_tokens=64), messages=[...])): ...

What a step does, from the outside in:

    engine      a request becomes a sequence, its pieces come back            asyncio
    worker      orders between steps, then a step                             the engine's thread, as all below
    scheduler   which tokens of which sequences run now
    batch       those tokens as one packed row
    runner      the model's forward pass over it
    attention   each sequence's queries against its own pages of keys
    sampling    the next token of each
    sequence    the token as text: whole characters, up to a stop string
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from whet.errors import WhetError
from whet.models.load import resolve
from whet.serve.engines.in_process.settings import Settings as Settings
from whet.serve.interface import Engine


def open_engine(
    folder: str | Path,
    *,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    adapters_folder: str | Path | None = None,
    settings: Settings | None = None,
) -> Engine:
    """An engine for a model folder or `builtin:tiny`, not started yet. A sentence-transformers folder makes embeddings.

    name: what clients call the model; None takes the folder's. See `InProcessEngine` for the rest.
    """
    from whet.serve.engines.in_process.embedding import EmbeddingEngine
    from whet.serve.engines.in_process.engine import InProcessEngine

    if (Path(resolve(str(folder))) / "modules.json").is_file():
        if adapters or adapters_folder:
            fix = "serve the adapter's own base"
            raise WhetError("an embedding model takes no adapters here", where=str(folder), fix=fix)
        return EmbeddingEngine(folder, name=name, settings=settings)
    return InProcessEngine(folder, name=name, adapters=adapters, adapters_folder=adapters_folder, settings=settings)
