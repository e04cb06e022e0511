"""The mark of tests that run kernels in Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import os

import pytest

from whet.kernels._triton import HAVE_TRITON

needs_interpreter = pytest.mark.skipif(
    not HAVE_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton's interpreter"
)
