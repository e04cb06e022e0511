"""One answer in the making: its tokens, how they are drawn, and what of their text may be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from whet.serve.engines.in_process.adapters import Adapter
from whet.serve.engines.in_process.sampling import Drawing, Drawn
from whet.serve.engines.in_process.vocabulary import Vocabulary
from whet.serve.engines.text import Detokenizer, Outgoing
from whet.serve.interface import Finish, Piece, TokenLogprob


@dataclass(eq=False)
class Sequence:
    """tokens: the prompt and what has been drawn. computed: how many of them have keys in `row`'s pages.

    most: tokens to draw at most. tell: where pieces go; an exception in place of a piece ends the answer.
    """

    tokens: list[int]
    most: int
    drawing: Drawing
    vocabulary: Vocabulary
    tell: Callable[[Piece | Exception], None]
    adapter: Adapter | None = None
    special: bool = False
    row: int | None = None
    computed: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self._text = Detokenizer(lambda tokens: self.vocabulary.decode(tokens, special=self.special))
        self._outgoing = Outgoing(self.drawing.sampling.stop)

    @property
    def drawn(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens without keys yet."""
        return len(self.tokens) - self.computed

    def add(self, drawn: Drawn) -> None:
        """Take the next token, tell what may be told, and finish where it ends the answer."""
        self.tokens.append(drawn.token)
        if drawn.token in self.vocabulary.ends:
            self._finish("", (), "stop")
            return
        self.drawing.accept(drawn.token)
        entry = None if self.drawing.sampling.logprobs is None else self._named(drawn)
        text, logprobs = self._outgoing.push(self._text.push(drawn.token), entry)
        matcher = self.drawing.matcher
        if self._outgoing.stopped or (matcher is not None and matcher.finished):
            self._finish(text, logprobs, "stop")
        elif self.drawn >= self.most:
            self._finish(text, logprobs, "length")
        elif text or logprobs:
            self.tell(Piece(text, logprobs))

    def fail(self, error: Exception) -> None:
        self.finished = True
        self.tell(error)

    def _finish(self, text: str, logprobs: tuple[TokenLogprob, ...], why: Finish) -> None:
        rest, more = self._outgoing.finish(self._text.flush())
        if self._outgoing.stopped:
            why = "stop"
        self.finished = True
        self.tell(Piece(text + rest, logprobs + more, (), why, self.prompt_tokens, self.drawn))

    def _named(self, drawn: Drawn) -> TokenLogprob:
        top = tuple(self._entry(token, logprob) for token, logprob in drawn.top)
        return self._entry(drawn.token, drawn.logprob, top)

    def _entry(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self.vocabulary.bytes_of(token)
        return TokenLogprob(raw.decode("utf-8", errors="replace"), raw, logprob, top)
