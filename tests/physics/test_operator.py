"""The laws of thickening, y = A x."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from ctsr.core.zgrid import ZGrid
from ctsr.errors import GeometryError
from ctsr.physics.operator import apply_along_z, grid_operator, thickening_matrix
from ctsr.physics.profile import FWHM_PER_SIGMA, ProfileKind, SliceProfile
from tests.physics.stacks import KINDS, RATIOS, columns, grids, operators

SEEDS = st.integers(0, 2**31)


@given(operators())
def test_rows_are_weights(A):
    assert (A >= 0).all()
    np.testing.assert_allclose(A.sum(axis=1), 1, atol=1e-12)


@given(operators(), st.integers(-32768, 32767))
def test_a_uniform_volume_keeps_its_hu(A, value):
    assert (np.rint(A @ np.full(A.shape[1], float(value))) == value).all()
    np.testing.assert_allclose(A @ np.full(A.shape[1], float(value)), value, atol=1e-9)  # HU


@given(operators(), SEEDS)
def test_the_transpose_is_the_adjoint(A, seed):
    x, y = columns(A.shape[1], seed, 1)[:, 0], columns(A.shape[0], seed + 1, 1)[:, 0]
    assert abs((A @ x) @ y - x @ (A.T @ y)) <= 1e-12 * np.linalg.norm(x) * np.linalg.norm(y)


@given(operators(), SEEDS, st.floats(-3, 3), st.floats(-3, 3))
def test_thickening_is_linear(A, seed, alpha, beta):
    x, y = columns(A.shape[1], seed), columns(A.shape[1], seed + 1)
    together = A @ (alpha * x + beta * y)
    limit = 1e-10 * (abs(alpha) * np.abs(x).max() + abs(beta) * np.abs(y).max())
    assert np.abs(together - alpha * (A @ x) - beta * (A @ y)).max() <= limit


@given(operators(), SEEDS, st.floats(-2000, 2000))
def test_the_mean_changes_by_what_the_column_sums_tell(A, seed, c):
    n, m = A.shape
    x = columns(m, seed, 1)[:, 0]
    w = m / n * A.sum(axis=0) - 1
    told = (w * (x - c)).sum() / m
    change = (A @ x).mean() - x.mean()
    assert np.isclose(change, told, atol=1e-9 * np.ptp(x) + 1e-9)
    assert abs(change) <= np.abs(w).max() * np.abs(x - x.mean()).mean() + 1e-9


@given(st.integers(1, 24), st.integers(2, 6), SEEDS)
def test_a_box_of_touching_slices_is_the_plain_mean_and_keeps_the_volumes(n, factor, seed):
    A = grid_operator(ZGrid(n, float(factor)), SliceProfile("box"), spacing=5.0, thickness=5.0)
    x = columns(n * factor, seed)
    np.testing.assert_allclose(A @ x, x.reshape(n, factor, -1).mean(axis=1), atol=1e-9)
    np.testing.assert_allclose(A @ A.T, np.eye(n) / factor, atol=1e-12)


@given(grids(), KINDS, RATIOS)
def test_a_flip_commutes(grid, kind, ratio):
    A = grid_operator(grid, SliceProfile(kind), spacing=2.0, thickness=2 * ratio)
    np.testing.assert_allclose(A[::-1, ::-1], A, atol=1e-9)


@given(st.integers(20, 30), st.integers(2, 5), KINDS, RATIOS)
def test_a_row_inside_is_symmetric_about_its_centre(n, factor, kind, ratio):
    grid = ZGrid(n, float(factor))
    A = grid_operator(grid, SliceProfile(kind), spacing=2.0, thickness=2 * ratio)
    k = n // 2
    reach = 6 * factor
    around = A[k, k * factor - reach : (k + 1) * factor + reach]
    np.testing.assert_allclose(around, around[::-1], atol=1e-12)
    assert around.sum() > 1 - 1e-9


@given(st.integers(20, 30), st.integers(2, 5), KINDS, RATIOS, SEEDS)
def test_a_volume_moved_by_one_thick_slice_gives_the_result_moved_by_one(n, factor, kind, ratio, seed):
    A = grid_operator(ZGrid(n, float(factor)), SliceProfile(kind), spacing=2.0, thickness=2 * ratio)
    x = columns(n * factor, seed)
    here, moved = A @ x, A @ np.roll(x, factor, axis=0)
    inside = slice(8, n - 8)  # where no row reaches an end
    np.testing.assert_allclose(moved[9 : n - 7], here[inside], atol=1e-6)  # HU


@pytest.mark.parametrize("factor", [2.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("ratio", [1.0, 1.25, 1.5, 2.0])
def test_the_second_moment_of_a_gaussian_row_is_the_difference_of_the_variances(factor, ratio):
    grid = ZGrid(31, factor)
    t, thin = 2 * ratio, 2 * ratio / factor
    A = grid_operator(grid, SliceProfile(), spacing=2.0, thickness=t)
    z = (grid.centres - grid.thick_centres[15]) * 2
    assert np.isclose((A[15] * z**2).sum(), (t**2 - thin**2) / (8 * np.log(2)), rtol=1e-3)


@pytest.mark.parametrize("factor", [2.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("ratio", [1.0, 1.25, 1.5, 2.0])
def test_that_of_a_triangle_is_a_sixth_of_the_difference(factor, ratio):
    grid = ZGrid(31, factor)
    t, thin = 2 * ratio, 2 * ratio / factor
    A = grid_operator(grid, SliceProfile("triangle"), spacing=2.0, thickness=t)
    z = (grid.centres - grid.thick_centres[15]) * 2
    expected = (t**2 - thin**2) / 6
    assert np.isclose((A[15] * z**2).sum(), expected, rtol=0.05)  # few slabs under a kernel with corners


def test_a_thinner_target_makes_a_wider_kernel():
    grid = ZGrid(31, 2.0)
    usual = grid_operator(grid, SliceProfile(), spacing=5.0, thickness=5.0)
    thinner = grid_operator(grid, SliceProfile(), spacing=5.0, thickness=5.0, thin_thickness=1.0)
    same = grid_operator(grid, SliceProfile(), spacing=5.0, thickness=5.0, thin_thickness=2.5)
    np.testing.assert_array_equal(usual, same)
    assert thinner[15, 30] < usual[15, 30]


def test_five_millimetres_of_one_millimetre_slices_by_hand():
    A = grid_operator(ZGrid(7, 5.0), SliceProfile(), spacing=5.0, thickness=5.0)
    sigma = np.sqrt((5.0**2 - 1.0**2) / FWHM_PER_SIGMA**2 - 1 / 12)
    expected = norm.cdf([0.5], scale=sigma) - norm.cdf([-0.5], scale=sigma)  # the slab at the centre
    assert np.isclose(A[3, 17], expected[0], rtol=1e-9)


def test_what_falls_outside_is_not_counted():
    A = grid_operator(ZGrid(1, 4.0), SliceProfile("box"), spacing=4.0, thickness=8.0)
    np.testing.assert_allclose(A, np.full((1, 4), 0.25))


def test_a_table_from_a_file_weighs_as_it_says():
    table = np.array([[-1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])  # a box of 2 mm
    A = grid_operator(ZGrid(5, 4.0), SliceProfile(ProfileKind.FILE, table), spacing=4.0, thickness=4.0)
    np.testing.assert_allclose(A[2, 8:12], [0, 0.5, 0.5, 0], atol=1e-9)


def test_a_slice_that_sees_nothing_is_refused():
    with pytest.raises(GeometryError, match="slice 1 at 50 mm"):
        thickening_matrix(
            np.arange(11.0), np.array([5.0, 50.0]), SliceProfile(), thickness=2.0, thin_thickness=1.0
        )


@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 9),
    SEEDS,
    st.sampled_from(["int16", "float32", "float64"]),
)
def test_the_streamed_product_is_the_plain_one(n, height, width, seed, dtype):
    volume = columns(n, seed, height * width).reshape(n, height, width).astype(dtype)
    matrix = np.random.default_rng(seed).normal(size=(2 * n, n))
    turned = np.asfortranarray(volume)[:, ::-1][:, ::-1]
    result = apply_along_z(matrix, turned)
    assert result.dtype == np.float32
    expected = np.einsum("mn,nhw->mhw", matrix, volume.astype(float))
    np.testing.assert_allclose(result, expected, atol=5e-2)  # HU; float32, weights up to 4, 3071 HU
    out = result.copy()
    assert apply_along_z(matrix, volume, add_to=out) is out
    np.testing.assert_allclose(out, 2 * expected, atol=1e-1)
