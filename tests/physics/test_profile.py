"""Slice profiles: unit area, the width that was asked for, and refusal of tables that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.errors import UsageError
from ctsr.physics.profile import FWHM_PER_SIGMA, ProfileKind, SliceProfile

_Z = np.linspace(-2, 2, 41)
HAT = np.column_stack([_Z, 1 - np.abs(_Z) / 2])
PROFILES = [
    SliceProfile(ProfileKind.GAUSSIAN),
    SliceProfile(ProfileKind.BOX),
    SliceProfile(ProfileKind.TRIANGLE),
    SliceProfile(ProfileKind.FILE, HAT),
]


def moments(profile: SliceProfile, thickness: float, thin: float, slab: float) -> tuple[float, float]:
    """Mean and variance of the kernel behind an integral, by differences on a fine grid, mm and mm²."""
    u = np.linspace(-20, 20, 40001)
    weights = np.diff(profile.integral(thickness, thin, slab)(u))
    z = (u[1:] + u[:-1]) / 2
    mean = float((weights * z).sum())
    return mean, float((weights * (z - mean) ** 2).sum())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.kind)
@given(thickness=st.floats(0.5, 8), factor=st.floats(1.2, 8))
def test_the_integral_rises_from_0_to_1_and_is_a_half_at_the_centre(profile, thickness, factor):
    integral = profile.integral(thickness, thickness / factor, 0.2)
    values = integral(np.linspace(-40, 40, 801))
    assert values[0] < 1e-12
    assert np.isclose(values[-1], 1, atol=1e-12)
    assert (np.diff(values) >= 0).all()
    assert np.isclose(integral(np.array(0.0)), 0.5, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "per_variance"), [(ProfileKind.GAUSSIAN, FWHM_PER_SIGMA**2), (ProfileKind.TRIANGLE, 6.0)]
)
@given(thickness=st.floats(1, 8), factor=st.floats(2, 8), share=st.floats(0.2, 1))
def test_variances_add_thin_and_slab_and_kernel_make_thick(kind, per_variance, thickness, factor, share):
    thin = thickness / factor
    slab = share * thin
    mean, variance = moments(SliceProfile(kind), thickness, thin, slab)
    assert abs(mean) < 1e-9
    whole = variance + slab**2 / 12 + thin**2 / per_variance
    assert np.isclose(whole, thickness**2 / per_variance, rtol=1e-3)  # 10⁻³ mm steps


@given(thickness=st.floats(0.5, 8), factor=st.floats(1.2, 8))
def test_a_box_has_its_own_width_whatever_the_thin_slices_are(thickness, factor):
    _, variance = moments(SliceProfile(ProfileKind.BOX), thickness, thickness / factor, 0.2)
    assert np.isclose(variance, thickness**2 / 12, rtol=1e-3)


def test_a_table_is_the_kernel_itself_at_any_thickness():
    for thickness, thin in ((1.0, 0.5), (5.0, 2.5)):
        _, variance = moments(SliceProfile(ProfileKind.FILE, HAT), thickness, thin, 0.2)
        assert np.isclose(variance, 2**2 / 6, rtol=1e-3)  # a triangle of half base 2 mm


def test_a_kernel_is_never_narrower_than_a_tenth_of_a_slab():
    for kind in (ProfileKind.GAUSSIAN, ProfileKind.TRIANGLE):
        _, variance = moments(SliceProfile(kind), 1.0, 1.0, 2.0)
        assert np.isclose(variance, 0.2**2, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gaussian", "triangle", "box"])
def test_the_kernel_of_a_doubling_is_root_three_quarters_of_the_thickness(kind):
    assert np.isclose(SliceProfile(kind).kernel_fwhm(5.0, 2.5), math.sqrt(0.75) * 5.0)


def test_the_kernel_width_of_a_table_is_that_of_the_gaussian_with_its_variance():
    width = SliceProfile("file", HAT).kernel_fwhm(5, 2.5)
    assert np.isclose(width, FWHM_PER_SIGMA * math.sqrt(4 / 6), rtol=0.01)


def test_a_table_is_brought_to_unit_area():
    table = SliceProfile("file", HAT * [1, 7.0]).table
    assert np.isclose(float(((table[1:, 1] + table[:-1, 1]) / 2 * np.diff(table[:, 0])).sum()), 1)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (HAT[:2], "at least three rows"), (HAT[:, :1], "two columns"), (HAT[::-1], "rising"),
        (HAT * [1, -1], "not negative"), (HAT * [1, 0], "not negative"),
        (np.full_like(HAT, np.nan), "two columns"), (np.add(HAT, [0.5, 0]), "centre of mass"),
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused(table, words):
    with pytest.raises(UsageError, match=words):
        SliceProfile(ProfileKind.FILE, table)


def test_a_table_belongs_to_the_kind_file_alone():
    with pytest.raises(ValueError, match="table"):
        SliceProfile(ProfileKind.BOX, HAT)
    with pytest.raises(ValueError, match="table"):
        SliceProfile(ProfileKind.FILE)
