"""The laws of upsampling by a matrix along z."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from ctsr.core.zgrid import ZGrid
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import projection_matrix
from ctsr.physics.zmatrix import (
    cubic_matrix,
    interpolation_matrix,
    inverse_matrix,
    linear_matrix,
    nearest_matrix,
)
from tests.physics.stacks import KINDS, RATIOS, columns, grids

SEEDS = st.integers(0, 2**31)
METHODS = ["nearest", "linear", "cubic"]


def inverse(grid: ZGrid, kind: str, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """The z-matrix `inverse` and its A."""
    A = grid_operator(grid, SliceProfile(kind), spacing=1.0, thickness=ratio)
    return inverse_matrix(interpolation_matrix("cubic", grid), A, projection_matrix(A)), A


@pytest.mark.parametrize("method", METHODS)
@given(grid=grids(), value=st.integers(-32768, 32767))
def test_a_constant_stays_constant(method, grid, value):
    matrix = interpolation_matrix(method, grid)
    assert matrix.shape == (grid.m, grid.n)
    np.testing.assert_allclose(matrix @ np.full(grid.n, float(value)), value, atol=1e-9 * 32768)


@given(grids(), KINDS, RATIOS)
def test_rows_of_the_inverse_sum_to_one(grid, kind, ratio):
    np.testing.assert_allclose(inverse(grid, kind, ratio)[0].sum(axis=1), 1, atol=1e-9)


@given(grids(), KINDS, st.floats(0.6, 1.25))
def test_the_inverse_gives_the_measurement_back(grid, kind, ratio):
    Z, A = inverse(grid, kind, ratio)
    if np.linalg.svd(A, compute_uv=False)[-1] * 3 >= np.linalg.norm(A, 2):  # undamped
        np.testing.assert_allclose(A @ Z, np.eye(grid.n), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@given(grid=grids())
def test_a_flip_commutes(method, grid):
    positions = grid.centres - 0.5
    if method == "nearest" and np.isclose(positions % 1, 0.5, atol=1e-6).any():
        return  # midway between two slices the upper one is taken
    matrix = interpolation_matrix(method, grid)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-9)


@pytest.mark.parametrize("method", ["nearest", "linear"])
@given(grid=grids(), seed=SEEDS)
def test_nearest_and_linear_stay_between_the_neighbours(method, grid, seed):
    values = columns(grid.n, seed, 1)[:, 0]
    result = interpolation_matrix(method, grid) @ values
    at = np.clip(grid.centres - 0.5, 0, grid.n - 1)
    low, high = values[np.floor(at).astype(int)], values[np.ceil(at).astype(int)]
    assert (result >= np.minimum(low, high) - 1e-9).all()
    assert (result <= np.maximum(low, high) + 1e-9).all()


@given(grids(), SEEDS)
def test_nearest_takes_the_nearest_slice_as_it_is(grid, seed):
    values = columns(grid.n, seed, 1)[:, 0]
    result = interpolation_matrix("nearest", grid) @ values
    distance = np.abs(grid.centres[:, None] - grid.thick_centres[None])
    for taken, apart in zip(result, distance, strict=True):
        assert taken in values[apart <= apart.min() + 1e-9]


@given(grids(min_slices=2), SEEDS)
def test_linear_equals_numpy(grid, seed):
    values = columns(grid.n, seed, 1)[:, 0]
    expected = np.interp(grid.centres, grid.thick_centres, values)
    np.testing.assert_allclose(interpolation_matrix("linear", grid) @ values, expected, atol=1e-9)


@given(grids(min_slices=2), SEEDS)
def test_cubic_equals_scipy(grid, seed):
    values = columns(grid.n, seed, 1)[:, 0]
    at = np.clip(grid.centres - 0.5, 0, grid.n - 1)
    expected = map_coordinates(values, [at], order=3, mode="mirror")
    np.testing.assert_allclose(interpolation_matrix("cubic", grid) @ values, expected, atol=1e-6 * 4095)


@pytest.mark.parametrize("method", METHODS)
@given(grid=grids(), seed=SEEDS, alpha=st.floats(-3, 3), beta=st.floats(-3, 3))
def test_upsampling_is_linear(method, grid, seed, alpha, beta):
    f = interpolation_matrix(method, grid)
    x, y = columns(grid.n, seed), columns(grid.n, seed + 1)
    limit = 1e-10 * (abs(alpha) * np.abs(x).max() + abs(beta) * np.abs(y).max())
    assert np.abs(f @ (alpha * x + beta * y) - alpha * (f @ x) - beta * (f @ y)).max() <= limit


@given(st.integers(2, 24))
def test_linear_and_cubic_hit_the_samples(n):
    at = np.arange(n, dtype=float)
    np.testing.assert_allclose(linear_matrix(at, n), np.eye(n), atol=1e-12)
    np.testing.assert_allclose(cubic_matrix(at, n), np.eye(n), atol=1e-9)
    np.testing.assert_array_equal(nearest_matrix(at, n), np.eye(n))


def test_midway_between_two_slices_the_upper_one_is_taken():
    np.testing.assert_array_equal(nearest_matrix(np.array([0.5, 1.5, 2.5]), 3), np.eye(3)[[1, 2, 2]])


def test_linear_by_hand_for_a_factor_of_two():
    expected = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_allclose(interpolation_matrix("linear", ZGrid(2, 2.0)), expected, atol=1e-12)
