"""What a Volume refuses, and what it can't be changed into afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.core.volume import Volume, rounded, storage_type
from ctsr.errors import GeometryError
from tests.strategies import volumes

DATA = np.zeros((2, 3, 4), np.int16)


def broken(**changes: float) -> np.ndarray:
    """The unit affine with entries replaced: broken(a23=5) sets row 2, column 3."""
    affine = np.eye(4)
    for place, value in changes.items():
        affine[int(place[1]), int(place[2])] = value
    return affine


@pytest.mark.parametrize(
    ("data", "affine", "words"),
    [
        (np.zeros((3, 4)), np.eye(4), "3 axes"),
        (np.zeros((1, 2, 3, 4)), np.eye(4), "3 axes"),
        (np.zeros((2, 0, 4)), np.eye(4), "has none"),
        (np.zeros((2, 3, 4), complex), np.eye(4), "complex"),
        (np.zeros((2, 3, 4), bool), np.eye(4), "bool"),
        (DATA, np.eye(3), "4 × 4"),
        (DATA, broken(a03=np.nan), "finite"),
        (DATA, broken(a11=np.inf), "finite"),
        (DATA, broken(a32=1.0), "0 0 0 1"),
        (DATA, broken(a22=0.0), "singular"),
    ],
)
def test_what_is_no_volume_is_refused(data, affine, words):
    with pytest.raises(GeometryError, match=words):
        Volume(data, affine)


@given(volumes())
def test_spacing_is_the_distance_of_neighbouring_centres(volume):
    origin = volume.affine @ [0, 0, 0, 1]
    for axis in range(3):
        step = np.eye(4)[axis] + [0, 0, 0, 1]
        assert np.isclose(np.linalg.norm(volume.affine @ step - origin), volume.spacing[axis], rtol=1e-9)


def test_the_affine_is_the_volumes_own():
    affine = np.eye(4)
    volume = Volume(DATA, affine)
    affine[0, 3] = 7.0
    assert volume.affine[0, 3] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        volume.affine[0, 3] = 7.0


def test_the_stored_type_decides_the_type_of_a_result():
    assert Volume(DATA, np.eye(4)).result_dtype == np.int16
    assert Volume(DATA, np.eye(4), stored_dtype=np.dtype(np.uint8)).result_dtype == np.uint8


# HU are rounded and limited in one place, and never wrap


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
