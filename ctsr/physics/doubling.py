"""The three matrices of one doubling, the same for training and inference."""

from __future__ import annotations

import numpy as np

from ctsr.core.zgrid import ZGrid
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import projection_matrix, projector
from ctsr.physics.zmatrix import interpolation_matrix, inverse_matrix

__all__ = ["doubling"]


def doubling(
    n: int, profile: SliceProfile, *, spacing: float, thickness: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (n, 2n), the `inverse` z-matrix (2n, n) and I − P A (2n, 2n) for one doubling of `n` slices; mm."""
    grid = ZGrid(n, 2.0)
    A = grid_operator(grid, profile, spacing=spacing, thickness=thickness)
    P = projection_matrix(A)
    return A, inverse_matrix(interpolation_matrix("cubic", grid), A, P), projector(A, P)
