"""Amounts as people write them."""

from __future__ import annotations

import re

BYTES = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


def parse_memory(amount: str | float) -> float:
    """Bytes of "24GiB", "24 GB", "512MiB", or of a number of GiB. Raises ValueError for what is neither."""
    if isinstance(amount, int | float) and not isinstance(amount, bool) and amount > 0:
        return float(amount) * BYTES["gib"]
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)\s*", str(amount), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f'{amount!r} is not an amount of memory; write "24GiB"')
    return float(found[1]) * BYTES[found[2].lower()]
