"""Which tokens run in the next forward pass: requests join and leave between any two steps.

Every sequence that generates gets its next token in each step. What the step's token budget leaves goes to prompts, in
the order of their arrival and in chunks, so that a long prompt slows those that generate but never holds them up. When
pages run out, the sequence that came last gives back its own and is computed again later, from the tokens it has.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from whet.serve.engines.in_process.pages import PageTable, pages_for
from whet.serve.engines.in_process.sequence import Sequence


@dataclass(frozen=True)
class Part:
    """A sequence's next `count` tokens without keys. gets_token: they are its last, so that a new one follows."""

    sequence: Sequence
    count: int

    @property
    def gets_token(self) -> bool:
        return self.count == self.sequence.left


class Scheduler:
    """Sequences that wait, and those that run: the latter in the order of their arrival."""

    def __init__(self, table: PageTable, step_tokens: int):
        self.table = table
        self.step_tokens = step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.recomputed = 0  # tokens whose keys were given up

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it holds."""
        sequence.finished = True
        if sequence in self.running:
            self._release(sequence)
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def drop_finished(self) -> None:
        for sequence in self.running:
            if sequence.finished:
                self._release(sequence)
        self.running = [sequence for sequence in self.running if not sequence.finished]

    def plan(self) -> list[Part]:
        """The parts of the next step. Empty when nothing runs or waits."""
        parts: dict[Sequence, Part] = {}
        budget = self.step_tokens
        for sequence in sorted(self.running, key=lambda s: s.left > 1):  # stable: those that generate go first
            generates = sequence.left == 1
            count = 1 if generates else min(sequence.left, budget)
            if sequence.row is not None and count > 0 and self._make_room(sequence, count):
                parts[sequence] = Part(sequence, count)
                budget -= 0 if generates else count
        while self.waiting and budget > 0 and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            count = min(sequence.left, budget)
            parts[sequence] = Part(sequence, count)
            budget -= count
        return [part for part in parts.values() if part.sequence.row is not None]  # others were preempted meanwhile

    def _admit(self, sequence: Sequence) -> bool:
        """Start a sequence if there are a row, pages for all that is known of it, and one for each that runs: those
        will soon want another, and would take this one's."""
        wanted = pages_for(len(sequence.tokens) + 1) + len(self.running)
        if not self.table.free_rows or wanted > self.table.free_pages:
            return False
        sequence.row = self.table.take_row()
        self.table.grow(sequence.row, len(sequence.tokens))
        self.running.append(sequence)
        return True

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` more tokens; False when the sequence itself had to give way."""
        assert sequence.row is not None
        while not self.table.grow(sequence.row, sequence.computed + count):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        self.recomputed += sequence.computed
        sequence.computed = 0
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self.table.give_back(sequence.row)
            sequence.row = None
