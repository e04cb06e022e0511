"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and IQ4_NL beside llama.cpp's own quantizer, on real weights and random ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.quant.samples import (
    IMPORTANCE,
    LLAMA_CPP_RMSE,
    SOURCES,
    encode_by_torch,
    encode_compiled,
    llama_cpp_bytes,
    weighted_rmse,
)
from whet.quant.gguf_types import TYPES

PLAIN = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
SEARCHED = ("q4_0", "q4_1", "q5_0", "q5_1")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("source", SOURCES)
def test_without_importance_the_bytes_are_llama_cpps(source: str, name: str) -> None:
    """Catches a scale rounded twice, a half rounded to even, a tie between -max and max, a misplaced fifth bit."""
    theirs = llama_cpp_bytes(f"{source}/{name}")
    x = SOURCES[source][: len(theirs)]
    np.testing.assert_array_equal(encode_compiled(TYPES[name], x), theirs)
    np.testing.assert_array_equal(encode_by_torch(TYPES[name], x), theirs)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("source", SOURCES)
def test_with_importance_the_error_is_no_larger_than_llama_cpps(source: str, name: str) -> None:
    """Catches importance that is dropped, or read for the wrong column."""
    theirs = LLAMA_CPP_RMSE[f"{source}/{name}/guided"]
    assert weighted_rmse(TYPES[name], SOURCES[source], IMPORTANCE) <= 1.01 * theirs


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_iq4_nl_is_no_worse_than_llama_cpp(source: str, guided: bool) -> None:
    """Catches a codebook read from its other end, and a search that stops at the plain scale."""
    theirs = LLAMA_CPP_RMSE[f"{source}/iq4_nl" + "/guided" * guided]
    assert weighted_rmse(TYPES["iq4_nl"], SOURCES[source], IMPORTANCE if guided else None) <= 1.01 * theirs


@pytest.mark.parametrize("bits", [4, 5])
def test_the_first_of_two_opposite_extremes_fixes_the_scale(bits: int) -> None:
    """Catches an extreme taken by sign: the format's reference keeps the first, and d has the other one's sign."""
    x = np.zeros((2, 32), np.float32)
    x[0, [3, 9]], x[1, [3, 9]] = (1, -1), (-1, 1)
    kind = TYPES[f"q{bits}_0"]
    d = encode_compiled(kind, x)[:, :2].copy().view(np.float16)[:, 0]
    assert d.tolist() == [-(2.0 ** (1 - bits)), 2.0 ** (1 - bits)]
    np.testing.assert_array_equal(encode_compiled(kind, x), encode_by_torch(kind, x))


def test_q8_0_rounds_halves_away_from_zero() -> None:
    """Catches rounding to even, which differs from llama.cpp's on every half."""
    x = np.zeros((1, 32), np.float32)
    x[0, :6] = [127, 2.5, -2.5, 0.5, -0.5, 0.49999997]
    for encoded in (encode_compiled(TYPES["q8_0"], x), encode_by_torch(TYPES["q8_0"], x)):
        assert encoded[0, 2:8].view(np.int8).tolist() == [127, 3, -3, 1, -1, 0]
