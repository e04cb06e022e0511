"""What a user sees when their input is at fault: what is wrong, where, and what to type instead.

The command line prints a `WhetError` without a traceback and exits with 2; anything else is a bug in whet.
"""

from __future__ import annotations


class WhetError(ValueError):
    """A fault in what the user gave us.

    what:  one sentence saying what is wrong.
    where: the file, line, field or argument it is in.
    fix:   what to type or do instead.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class WhetErrors(WhetError):
    """Several faults found at once, so that they can be mended at once."""

    def __init__(self, errors: list[WhetError]):
        self.errors = errors
        super().__init__("\n".join(str(error) for error in errors))
