"""From whoever makes an answer to whoever reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from whet.serve.interface import Piece


class Mailbox:
    """Pieces of one answer on their way to whoever reads it. Those that wait are read as one, so a slow reader holds
    no more than the answer's text."""

    def __init__(self) -> None:
        self._items: list[Piece | Exception] = []
        self._filled = asyncio.Event()

    def put(self, item: Piece | Exception) -> None:
        self._items.append(item)
        self._filled.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        finished = False
        while not finished:
            await self._filled.wait()
            self._filled.clear()
            items, self._items = self._items, []
            pieces = [item for item in items if isinstance(item, Piece)]
            if pieces:
                piece = merged(pieces)
                finished = piece.finish is not None
                yield piece
            for item in items:
                if isinstance(item, Exception):
                    raise item


def merged(pieces: Sequence[Piece]) -> Piece:
    """Pieces in their order as one."""
    if len(pieces) == 1:
        return pieces[0]
    last = pieces[-1]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(entry for piece in pieces for entry in piece.logprobs),
        tuple(call for piece in pieces for call in piece.tool_calls),
        last.finish,
        last.prompt_tokens,
        last.completion_tokens,
    )
