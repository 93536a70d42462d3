"""HU are rounded and limited in one place, and never wrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.core.storage import rounded, storage_type


@pytest.mark.parametrize(
    ("wanted", "low", "high", "stored"),
    [
        ("int16", -1024, 3071, "int16"),
        ("uint16", 0, 3071, "uint16"),
        ("uint16", -1024, 3071, "int16"),  # the file had an intercept
        ("uint16", -1024, 40000, "float32"),
        ("uint8", 0, 255.4, "uint8"),
        ("uint8", 0, 255.6, "int16"),
        ("int32", -1024, 70000, "int32"),
        ("float64", -1024, 3071, "float32"),
        ("float32", -1024, 70000, "float32"),
        ("int16", -32768.4, 32767.4, "int16"),
        ("int16", 0, 32767.6, "float32"),
    ],
)
def test_the_inputs_type_then_int16_then_float32(wanted, low, high, stored):
    assert storage_type(np.dtype(wanted), low, high) == stored


@given(st.floats(-1e9, 1e9), st.sampled_from(["uint8", "int16", "uint16", "int32"]))
def test_no_value_wraps(value, dtype):
    info = np.iinfo(dtype)
    found = int(rounded(np.array([value]), np.dtype(dtype))[0])
    assert found == min(max(round(value), info.min), info.max)


def test_a_float_type_is_only_cast():
    assert rounded(np.array([1.5, 1e6]), np.dtype(np.float32)).tolist() == [1.5, 1e6]
