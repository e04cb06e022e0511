"""Amounts as people write them."""

from __future__ import annotations

import pytest

from whet.units import parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24 GB", 24e9), ("512mib", 512 * 2**20), (6.77, 6.77 * 2**30), (24, 24 * 2**30)],
)
def test_amounts_of_memory(text: str | float, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "24", "24 apples", "-3GiB", "0GiB", 0, -1, True, None])
def test_what_is_no_amount_of_memory_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="24GiB"):
        parse_memory(text)  # type: ignore[arg-type]
