"""From tokens to text as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from whet.serve.interface import TokenLogprob

UNKNOWN = "\ufffd"
WINDOW = 8
"""Tokens that are decoded again with each new one, before the oldest are let go."""


class Detokenizer:
    """decode: token ids to text. Pieces that `push` and `flush` return add up to the text of all tokens.

    A token's text can depend on those before it (a leading space is dropped at the start of a text, a character may be
    spread over tokens), so the last few are decoded together with each new one, and what they had said is cut off.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._window: list[int] = []
        self._told = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        settled = text.rstrip(UNKNOWN)  # bytes that may yet become a character
        new = settled[self._told :]
        self._told = max(self._told, len(settled))
        if len(settled) == len(text) and len(self._window) >= WINDOW:
            self._let_go()
        return new

    def flush(self) -> str:
        """What was held back, at the answer's end: bytes that became no character."""
        rest = self._decode(self._window)[self._told :] if self._window else ""
        self._told += len(rest)
        return rest

    def _let_go(self) -> None:
        """Keep the window's last tokens, if their text stands by itself."""
        kept = self._window[-WINDOW // 2 :]
        text = self._decode(kept)
        if text and not text.startswith(UNKNOWN):
            self._window, self._told = kept, len(text)


class StopStrings:
    """Passes text on up to the first of `stops`; holds back an end that may be a stop's beginning."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, when no stop came."""
        rest, self._held = self._held, ""
        return rest

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of `text` that `stop` begins with."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class Outgoing:
    """An answer's text and its tokens' log-probabilities, up to the first of `stops`.

    A token's entry goes out with the last of its text: what is held back holds its tokens back, and a token whose text
    is cut off by a stop is not told of.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = StopStrings(stops)
        self._told = self._seen = 0  # characters gone out, and those held back too
        self._entries: deque[tuple[int, TokenLogprob]] = deque()

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def push(self, text: str, entry: TokenLogprob | None = None) -> tuple[str, tuple[TokenLogprob, ...]]:
        """Text that a token has settled, and that token's entry. What may go out now."""
        self._seen += len(text)
        if entry is not None:
            self._entries.append((self._seen, entry))
        return self._out(self._stops.push(text))

    def finish(self, rest: str) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The same for the end of an answer, which settles `rest`."""
        if self.stopped:
            return "", ()
        text = self._stops.push(rest)
        text += self._stops.flush()
        out, entries = self._out(text)
        if not self.stopped:
            entries += tuple(entry for _, entry in self._entries)
            self._entries.clear()
        return out, entries

    def _out(self, text: str) -> tuple[str, tuple[TokenLogprob, ...]]:
        self._told += len(text)
        entries = []
        while self._entries and self._entries[0][0] <= self._told:
            entries.append(self._entries.popleft()[1])
        return text, tuple(entries)
