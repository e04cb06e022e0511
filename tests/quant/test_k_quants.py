"""Q2_K to Q6_K beside llama.cpp's own quantizer, on real weights and random ones."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.quants import dequantize

from tests.quant.samples import IMPORTANCE, LLAMA_CPP_RMSE, SOURCES, encode_compiled, llama_cpp_bytes, weighted_rmse
from whet.quant.gguf_types import TYPES

NAMES = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", SOURCES)
def test_the_error_is_no_larger_than_llama_cpps(source: str, name: str, guided: bool) -> None:
    """Catches a search that has stopped searching, scales rounded without trying their neighbours, and importance
    that is dropped or read for the wrong column."""
    theirs = LLAMA_CPP_RMSE[f"{source}/{name}" + "/guided" * guided]
    assert weighted_rmse(TYPES[name], SOURCES[source], IMPORTANCE if guided else None) <= 1.01 * theirs


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "iq4_nl"])
def test_llama_cpps_own_bytes_decode_as_gguf_says(name: str, guided: bool) -> None:
    """Catches an unpacking that is right only for what our encoder writes."""
    kind, data = TYPES[name], llama_cpp_bytes(f"tiny_query/{name}" + "/guided" * guided)
    decoded = kind.decode(data)
    np.testing.assert_array_equal(decoded, dequantize(data, kind.ggml))
    x = SOURCES["tiny_query"][: len(data)]
    assert np.corrcoef(decoded.ravel(), x.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_what_counts_more_is_kept_better(name: str) -> None:
    """Catches importance used as its own inverse: errors move from the columns that count to those that do not."""
    x = SOURCES["gaussian"]
    importance = np.where(np.arange(256) % 4 == 0, 100, 1).astype(np.float32)
    heavy = importance > 1
    plain = TYPES[name].decode(encode_compiled(TYPES[name], x)) - x
    guided = TYPES[name].decode(encode_compiled(TYPES[name], x, importance)) - x
    assert (guided[:, heavy] ** 2).mean() < 0.9 * (plain[:, heavy] ** 2).mean()
