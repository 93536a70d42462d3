"""Measured stays measured: the laws of the projection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space

from ctsr.core.zgrid import ZGrid
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import NORM_LIMIT, projection_matrix, projector
from tests.physics.stacks import columns, operators

SEEDS = st.integers(0, 2**31)
UNDAMPED = operators(ratios=st.floats(0.6, 1.25))


def gaussian(n: int, factor: float, ratio: float) -> np.ndarray:
    return grid_operator(ZGrid(n, factor), SliceProfile(), spacing=1.0, thickness=ratio)


def is_damped(A: np.ndarray) -> bool:
    return bool(np.abs(A @ projection_matrix(A) - np.eye(len(A))).max() > 1e-9)


def projected(A: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x + projection_matrix(A) @ (y - A @ x)


@given(UNDAMPED, SEEDS)
def test_thickening_the_result_gives_the_input_back(A, seed):
    y = columns(A.shape[0], seed)
    x = projected(A, columns(A.shape[1], seed + 1), y)
    np.testing.assert_allclose(A @ x, y, atol=1e-8)  # HU


@given(UNDAMPED, SEEDS)
def test_a_second_projection_changes_nothing(A, seed):
    y = columns(A.shape[0], seed)
    once = projected(A, columns(A.shape[1], seed + 1), y)
    np.testing.assert_allclose(projected(A, once, y), once, atol=1e-8)  # HU


@given(operators(), SEEDS)
def test_what_agrees_already_is_not_changed(A, seed):
    x = columns(A.shape[1], seed)
    np.testing.assert_allclose(projected(A, x, A @ x), x, atol=1e-8)  # HU


@given(operators(), SEEDS)
def test_the_step_is_at_right_angles_to_all_that_the_measurement_does_not_see(A, seed):
    step = projection_matrix(A) @ columns(A.shape[0], seed)
    hidden = null_space(A)
    assert np.abs(hidden.T @ step).max(initial=0) <= 1e-9 * np.linalg.norm(step)


@given(UNDAMPED, SEEDS)
def test_no_volume_that_agrees_is_nearer(A, seed):
    x, y = columns(A.shape[1], seed, 1), columns(A.shape[0], seed + 1, 1)
    nearest = x + np.linalg.lstsq(A, y - A @ x, rcond=None)[0]  # the least-norm step, by SVD
    np.testing.assert_allclose(projected(A, x, y), nearest, atol=1e-6)  # HU


@given(operators(ratios=st.floats(0.6, 4)))
def test_noise_is_amplified_by_three_at_most(A):
    amplified = np.linalg.norm(A, 2) * np.linalg.norm(projection_matrix(A), 2)
    assert amplified <= NORM_LIMIT * (1 + 1e-9)


@given(operators(ratios=st.floats(0.6, 4)))
def test_no_more_is_damped_than_the_limit_asks(A):
    amplified = np.linalg.norm(A, 2) * np.linalg.norm(projection_matrix(A), 2)
    sees_twice = np.linalg.matrix_rank(A, tol=1e-6) < len(A)
    assert not is_damped(A) or sees_twice or np.isclose(amplified, NORM_LIMIT, rtol=0.02)


@given(st.integers(2, 5), st.floats(1.1, 6), st.floats(3, 12), SEEDS)
def test_slices_that_see_the_same_are_no_trouble(n, factor, ratio, seed):
    A = grid_operator(ZGrid(n, factor), SliceProfile("box"), spacing=1.0, thickness=ratio)
    P = projection_matrix(A)
    assert np.linalg.norm(A, 2) * np.linalg.norm(P, 2) <= NORM_LIMIT * (1 + 1e-9)
    x = columns(A.shape[1], seed)
    np.testing.assert_allclose(x + P @ (A @ x - A @ x), x)


@pytest.mark.parametrize(
    ("factor", "ratio", "gain"),
    [
        (2.0, 0.8, 1.58), (2.0, 1.0, 1.96), (2.0, 1.25, 2.84), (2.0, 1.5, 4.48), (2.0, 2.0, 14.2),
        (5.0, 0.8, 2.73), (5.0, 1.0, 3.71), (5.0, 1.25, 5.99), (5.0, 1.5, 10.7), (5.0, 2.0, 47.0),
    ],
)  # fmt: skip
def test_the_undamped_gain_is_the_documented_one(factor, ratio, gain):
    A = gaussian(40, factor, ratio)
    assert np.isclose(1 / np.linalg.svd(A, compute_uv=False)[-1], gain, rtol=0.01)
    assert np.isclose(np.linalg.norm(A, 2), 1 / np.sqrt(factor), rtol=0.02)
    if not is_damped(A):
        assert np.isclose(np.linalg.norm(projection_matrix(A), 2), gain, rtol=0.01)


@pytest.mark.parametrize(("factor", "last"), [(2.0, 1.47), (5.0, 1.30)])
def test_agreement_is_exact_up_to_the_documented_thickness(factor, last):
    assert not is_damped(gaussian(60, factor, last - 0.02))
    assert is_damped(gaussian(60, factor, last + 0.03))


@given(operators(), SEEDS)
def test_the_projector_is_what_the_measurement_does_not_determine(A, seed):
    P = projection_matrix(A)
    change = columns(A.shape[1], seed)
    np.testing.assert_allclose(projector(A, P) @ change, change - P @ (A @ change), atol=1e-8)
