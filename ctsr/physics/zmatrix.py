"""Upsampling along z by one matrix each: nearest, linear, cubic B-spline, and cubic plus the projection."""

from __future__ import annotations

import numpy as np

from ctsr.core.zgrid import ZGrid

__all__ = ["cubic_matrix", "interpolation_matrix", "inverse_matrix", "linear_matrix", "nearest_matrix"]


def nearest_matrix(positions: np.ndarray, n: int) -> np.ndarray:
    """(m, n): the slice whose centre is nearest. positions: (m,) in slice indices of the input."""
    matrix = np.zeros((len(positions), n))
    matrix[np.arange(len(positions)), np.clip(np.floor(positions + 0.5).astype(int), 0, n - 1)] = 1.0
    return matrix


def linear_matrix(positions: np.ndarray, n: int) -> np.ndarray:
    """(m, n): between the two neighbours; the end slices hold beyond their centres."""
    clamped = np.clip(positions, 0, n - 1)
    matrix: np.ndarray = np.maximum(0.0, 1.0 - np.abs(clamped[:, None] - np.arange(n)[None, :]))
    return matrix


def cubic_matrix(positions: np.ndarray, n: int) -> np.ndarray:
    """(m, n): the interpolating cubic B-spline, mirrored at the end centres (Unser 1999; SciPy's "mirror").

    Positions beyond the first and last centre are clamped to them.
    """
    if n == 1:
        return np.ones((len(positions), 1))
    sampling = _spline_weights(np.arange(n, dtype=np.float64), n)
    weights = _spline_weights(np.clip(positions, 0, n - 1), n)
    return np.linalg.solve(sampling.T, weights.T).T


def inverse_matrix(cubic: np.ndarray, A: np.ndarray, P: np.ndarray) -> np.ndarray:
    """(m, n): cubic, then the projection: cubic + P (I − A·cubic). Agrees with y; rows sum to one."""
    matrix: np.ndarray = cubic + P @ (np.eye(len(A)) - A @ cubic)
    return matrix


def interpolation_matrix(method: str, grid: ZGrid) -> np.ndarray:
    """(m, n) for `nearest`, `linear` or `cubic` on the thin grid of `grid`."""
    make = {"nearest": nearest_matrix, "linear": linear_matrix, "cubic": cubic_matrix}[method]
    return make(grid.centres - 0.5, grid.n)


def _spline_weights(positions: np.ndarray, n: int) -> np.ndarray:
    """(m, n): cubic B-spline basis at `positions`, coefficients mirrored at 0 and n − 1."""
    matrix = np.zeros((len(positions), n))
    base = np.floor(positions).astype(int)
    period = 2 * (n - 1)
    for offset in range(-1, 3):
        distance = np.abs(positions - (base + offset))
        weight = np.where(
            distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
        )
        index = np.abs(base + offset) % period
        np.add.at(matrix, (np.arange(len(positions)), np.minimum(index, period - index)), weight)
    return matrix
