"""The compiled searches and those in torch give the same bytes, and blocks that no model has stay within bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.quant.samples import IMPORTANCE, SOURCES, Floats, encode_by_torch, encode_compiled
from whet.errors import WhetError
from whet.quant.gguf_types import TYPES
from whet.quant.grids import CODEBOOK
from whet.quant.kernels import PATIENCE, TORCH, compiled, for_cpu
from whet.quant.rounding_cpu import _affine_scales
from whet.quant.symmetric_cpu import _nearest

QUANTIZED = [name for name, kind in TYPES.items() if kind.block_size > 1]
NUMBERS = st.one_of(
    st.just(0.0),
    st.floats(-1, 1, width=32),
    st.floats(-1000, 1000, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32),  # denormal
    st.sampled_from([1.0, -1.0, 0.5, 3000.0, -3000.0, 1e-30, 2.0**-25]),
)
BLOCKS = st.one_of(
    hnp.arrays(np.float32, (1, 256), elements=NUMBERS, fill=st.just(0.0)),
    NUMBERS.map(lambda value: np.full((1, 256), value, np.float32)),
)
IMPORTANCES = hnp.arrays(
    np.float32, 256, elements=st.sampled_from([0.0, 1.0, 1e-30, 1e-6, 1e6, 1e30, 0.3, 7.0]), fill=st.just(1.0)
)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_compiled_and_torch_give_the_same_bytes(name: str, guided: bool) -> None:
    """Catches sums in another order, a multiplication fused with an addition, and a tile filled wrongly at its end."""
    importance = IMPORTANCE if guided else None
    for x in SOURCES.values():
        x = x[:9]
        np.testing.assert_array_equal(
            encode_compiled(TYPES[name], x, importance), encode_by_torch(TYPES[name], x, importance)
        )


@pytest.mark.parametrize("name", QUANTIZED)
def test_zeros_of_either_sign_give_the_same_bytes(name: str) -> None:
    """Catches a compiler that gives a scale of 0 another sign."""
    signs = np.random.default_rng(0).choice(np.array([0.0, -0.0], np.float32), (64, 256))
    x = np.concatenate([signs, np.zeros((1, 256), np.float32), -np.zeros((1, 256), np.float32)])
    np.testing.assert_array_equal(encode_compiled(TYPES[name], x), encode_by_torch(TYPES[name], x))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(QUANTIZED), BLOCKS, st.none() | IMPORTANCES)
def test_any_block_is_within_bounds_and_the_same_by_both(name: str, x: Floats, importance: Floats | None) -> None:
    """Catches a search that wanders off, overflow, and 0 / 0, on zero, constant, huge and denormal blocks."""
    kind = TYPES[name]
    encoded = encode_compiled(kind, x, importance)
    np.testing.assert_array_equal(encoded, encode_by_torch(kind, x, importance))
    error = np.abs(kind.decode(encoded) - x).reshape(-1, kind.block_size)
    assert (error <= kind.error_bound(x, guided=importance is not None)).all()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_the_largest_magnitude_still_decodes_to_numbers(name: str, guided: bool) -> None:
    """Catches an fp16 scale that overflows to infinity."""
    kind = TYPES[name]
    x = np.linspace(-kind.max_abs, kind.max_abs, 256, dtype=np.float32)[None]
    assert np.isfinite(kind.decode(encode_compiled(kind, x, IMPORTANCE if guided else None))).all()


@pytest.mark.parametrize("bad", [np.ones(255, np.float32), np.full(256, np.nan, np.float32), -np.ones(256, np.float32)])
def test_importance_that_is_none_is_refused(bad: Floats) -> None:
    """Catches an importance matrix of another model, or one that was never measured, used in silence."""
    with pytest.raises(WhetError, match="importance"):
        encode_compiled(TYPES["q4_k"], np.ones((1, 256), np.float32), bad)


def test_importance_of_zero_everywhere_counts_every_error_alike() -> None:
    """Catches 0 / 0 for a column of experts that no calibration text reached."""
    x = SOURCES["gaussian"]
    kind = TYPES["q4_k"]
    nothing, ones = np.zeros(256, np.float32), np.ones(256, np.float32)
    np.testing.assert_array_equal(encode_compiled(kind, x, nothing), encode_compiled(kind, x, ones))


def test_the_compiled_codebook_is_the_codebook() -> None:
    """Catches a middle between two levels copied wrongly: every number goes to its nearest level."""
    values = np.arange(-140, 130, 0.25, dtype=np.float32)
    levels = np.array(CODEBOOK, np.float32)
    for value in values:
        distance = np.abs(levels - value)
        assert abs(_nearest(value) - value) == distance.min()


def test_a_process_compiles_once_there_is_much_to_encode() -> None:
    """Catches seconds of compiling for a model of a few million weights, and a large one encoded at a quarter of the
    speed."""
    assert for_cpu("small", PATIENCE) is TORCH
    assert for_cpu("large", PATIENCE // 2) is TORCH
    assert for_cpu("large", PATIENCE) is compiled()
    assert for_cpu("large", 1) is compiled()


def test_every_half_is_rounded_as_torch_does() -> None:
    """Catches an fp16 scale that is a bit off: halves to even, numbers below fp16's normal ones, both zeros."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(between, np.float32(end)) for end in (0, 1e9)]
    low = np.concatenate([halves, between, *near, [0.0]]).astype(np.float32)
    low = np.concatenate([low, -low])
    out = np.empty((len(low), 2), np.uint16)
    _affine_scales(low.copy(), low.copy(), np.float32(15), out)
    np.testing.assert_array_equal(out[:, 1], (low + 0.0).astype(np.float16).view(np.uint16))
