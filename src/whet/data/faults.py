"""Gathers faults in a data set, so that a user sees up to twenty at once instead of one a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from whet.errors import WhetError, WhetErrors

LIMIT = 20


@dataclass
class Faults:
    """A list of faults that raises itself: at the twentieth (`add`), or when asked (`raise_if_any`)."""

    errors: list[WhetError] = field(default_factory=list)

    def add(self, error: WhetError) -> None:
        self.errors.append(error)
        if len(self.errors) >= LIMIT:
            raise WhetErrors([*self.errors, WhetError(f"stopped at {LIMIT} faults; there may be more")])

    def raise_if_any(self) -> None:
        if self.errors:
            raise WhetErrors(self.errors)


def raise_at_once(error: WhetError) -> None:
    """The handler for callers that want the first fault raised."""
    raise error
