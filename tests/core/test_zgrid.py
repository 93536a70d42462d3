"""The thin grid of a thick stack: edges kept, centred, nothing turned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctsr.core.geometry import slice_axis
from ctsr.core.zgrid import ZGrid, shifted_affine, thick_count
from ctsr.physics.zmatrix import interpolation_matrix
from tests.strategies import rotation, volumes

COUNTS = st.integers(1, 400)
FACTORS = st.one_of(st.integers(2, 20).map(float), st.floats(1, 20))


@given(COUNTS, FACTORS)
def test_the_slab_is_covered_to_half_a_thin_slice(n, factor):
    thin = 1 / factor
    assert abs(ZGrid(n, factor).m * thin - n) <= thin / 2 + 1e-8


@given(COUNTS, FACTORS)
def test_the_middle_stays_where_it_was(n, factor):
    grid = ZGrid(n, factor)
    assert np.isclose((grid.centres[0] + grid.centres[-1]) / 2, n / 2, atol=1e-9)
    assert np.isclose((grid.edges[0] + grid.edges[-1]) / 2, n / 2, atol=1e-9)


@given(COUNTS, st.integers(1, 20))
def test_edges_are_kept_where_the_count_is_whole(n, factor):
    grid = ZGrid(n, float(factor))
    assert grid.m == n * factor
    np.testing.assert_allclose(grid.edges[[0, -1]], [0, n], atol=1e-9)
    np.testing.assert_allclose(grid.edges[::factor], np.arange(n + 1), atol=1e-9)


@given(COUNTS, FACTORS)
def test_the_grid_is_the_same_seen_from_the_other_end(n, factor):
    grid = ZGrid(n, factor)
    np.testing.assert_allclose(n - grid.centres[::-1], grid.centres, atol=1e-9)


@given(COUNTS, FACTORS)
def test_centres_lie_midway_between_evenly_spaced_edges(n, factor):
    grid = ZGrid(n, factor)
    assert len(grid.edges) == len(grid.centres) + 1 == grid.m + 1
    np.testing.assert_allclose(np.diff(grid.edges), 1 / factor, atol=1e-9)
    np.testing.assert_allclose((grid.edges[1:] + grid.edges[:-1]) / 2, grid.centres, atol=1e-9)
    assert np.isclose(grid.centres[0] - 0.5, grid.first)


@pytest.mark.parametrize(
    ("n", "factor", "m"),
    [
        (1, 2.5, 3), (1, 1.5, 2), (3, 1.5, 5), (7, 2.5, 18), (22, 2.5, 55), (5, 0.5, 3), (1, 4.5, 5),
        (133, 2.0, 266),
    ],
)  # fmt: skip
def test_a_half_slice_is_rounded_up_not_to_even(n, factor, m):
    assert ZGrid(n, factor).m == m


def test_a_count_that_is_half_but_for_rounding_is_half():
    assert 5 * (0.7 / 0.2) < 17.5  # the quotient falls short of 3.5
    assert ZGrid(5, 0.7 / 0.2).m == 18


@pytest.mark.parametrize(("factor", "first"), [(2.0, -0.25), (3.0, -1 / 3), (5.0, -0.4), (1.0, 0.0)])
def test_the_first_centre_moves_outwards_by_half_the_difference_of_the_slices(factor, first):
    assert np.isclose(ZGrid(9, factor).first, first, atol=1e-12)


def test_5_mm_to_2_5_mm_moves_the_origin_by_1_25_mm():
    thin = ZGrid(30, 2.0).affine(np.diag([0.7, 0.7, 5.0, 1.0]), 2)
    np.testing.assert_allclose(thin[:3, 3], [0, 0, -1.25], atol=1e-12)
    np.testing.assert_allclose(np.diag(thin), [0.7, 0.7, 2.5, 1.0], atol=1e-12)


def test_at_15_degrees_the_slice_direction_does_not_turn():
    half = np.radians(15) / 2
    affine = np.eye(4)
    affine[:3, :3] = rotation(np.array([np.cos(half), np.sin(half), 0, 0])) @ np.diag([0.7, 0.7, 5])
    thin = ZGrid(30, 2.0).affine(affine, 2)
    np.testing.assert_allclose(thin[:3, 2], affine[:3, 2] / 2, rtol=1e-12)
    along = affine[:3, 2] / 5
    np.testing.assert_allclose(
        thin[:3, 3], -1.25 * along, atol=1e-12
    )  # along the slice axis, not along world z
    np.testing.assert_array_equal(thin[:, :2], affine[:, :2])


@given(volumes(), FACTORS)
def test_nothing_but_the_slice_column_and_the_origin_moves(volume, factor):
    axis, _ = slice_axis(volume)
    grid = ZGrid(volume.shape[axis], factor)
    thin = grid.affine(volume.affine, axis)
    kept = [a for a in range(3) if a != axis]
    np.testing.assert_array_equal(thin[:, kept], volume.affine[:, kept])
    np.testing.assert_allclose(thin[:3, axis], volume.affine[:3, axis] / factor, rtol=1e-12)
    middle_thick, middle_thin = np.eye(4)[3].copy(), np.eye(4)[3].copy()
    middle_thick[axis], middle_thin[axis] = (grid.n - 1) / 2, (grid.m - 1) / 2
    np.testing.assert_allclose(thin @ middle_thin, volume.affine @ middle_thick, atol=1e-9)  # mm
    assert np.isclose(np.linalg.norm(thin[:3, axis]) * factor, volume.spacing[axis], rtol=1e-9)


@given(st.integers(5, 40), st.sampled_from([2.0, 2.5, 3.0, 4.0, 5.0]), st.data())
def test_a_wire_in_one_slice_stays_where_it_is(n, factor, data):
    at = data.draw(st.integers(2, n - 3))
    grid = ZGrid(n, factor)
    weights = interpolation_matrix("linear", grid)[:, at]
    affine = np.diag([0.7, 0.7, -5.0, 1.0])  # a flipped axis, where a wrong sign shows
    thin = grid.affine(affine, 2)
    z = thin[2, 3] + thin[2, 2] * np.arange(grid.m)
    assert abs((weights * z).sum() / weights.sum() - -5.0 * at) < 0.02 * 5  # mm


@given(volumes(), st.floats(-3, 3), st.floats(0.1, 9), st.integers(0, 5))
def test_a_shifted_grid_lies_where_it_says(volume, first, step, index):
    axis, _ = slice_axis(volume)
    there, here = np.eye(4)[3].copy(), np.eye(4)[3].copy()
    there[axis], here[axis] = index, first + step * index
    moved = shifted_affine(volume.affine, axis, first=first, step=step)
    np.testing.assert_allclose(moved @ there, volume.affine @ here, atol=1e-9)  # mm


@given(COUNTS, st.one_of(st.integers(1, 20).map(float), st.sampled_from([1.5, 2.5, 4 / 3, 1.2, 50 / 7])))
def test_thick_slices_fill_whole_thin_ones_and_as_many_as_can(m, factor):
    n = thick_count(m, factor)
    whole = [
        k
        for k in range(1, m + 1)
        if k * factor <= m + 1e-6 and abs(k * factor - round(k * factor)) < 1e-6 * k
    ]
    assume(whole)
    assert n == whole[-1]


@given(COUNTS, st.floats(1, 20))
def test_thick_slices_never_need_more_than_there_are(m, factor):
    n = thick_count(m, factor)
    assert n == 0 or ZGrid(n, factor).m <= m


@pytest.mark.parametrize(("m", "factor", "n"), [(56, 3.0, 18), (133, 2.5, 52), (22, 2.5, 8), (1, 2.0, 0)])
def test_what_is_left_over_is_dropped(m, factor, n):
    assert thick_count(m, factor) == n
