"""Numbers as people read them."""

from __future__ import annotations

import math


def count(number: int) -> str:
    return f"{number:,}"


def percent(part: float, whole: float) -> str:
    """A share with one digit after the point, two below 1%; what is not nothing never reads as 0%."""
    if not whole:
        return "n/a"
    share = 100 * part / whole
    if 0 < share < 0.01:
        return "< 0.01%"
    if share > 99.9 and part != whole:
        return "> 99.9%"
    return f"{share:.2f}%" if 0 < share < 1 else f"{share:.1f}%"


def size_of(number: int) -> str:
    """Bytes in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number} B"


def compact(number: float) -> str:
    """Four digits at most: 0.0123, 1.27, 412, 21.4k, 1.8e-4."""
    size = abs(number)
    if size == 0 or not math.isfinite(number):
        return "0" if size == 0 else str(number)
    if size < 0.001:
        return f"{number:.1e}".replace(".0e", "e").replace("e-0", "e-")
    for unit, limit in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if size >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{number / scale:.3g}{unit}"
    return f"{number:.4g}"


def three(number: float) -> str:
    """Three digits: what a score is known to, at best."""
    return f"{number:.3g}"


def gib(number: float) -> str:
    """An amount of memory, given in GiB."""
    return f"{number:.3g} GiB"


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 4.1 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole // 60 % 60:02} min"
