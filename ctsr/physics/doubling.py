"""The three matrices of one doubling, the same for training and inference."""

from __future__ import annotations

import numpy as np

from ctsr.core.zgrid import ZGrid
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.physics.projection import damping, projection_matrix, projector
from ctsr.physics.zmatrix import interpolation_matrix, inverse_matrix

__all__ = ["doubling"]


_LONG = 200  # slices; a stack's damping has reached its limit by then, to 10⁻⁴


def doubling(
    n: int, profile: SliceProfile, *, spacing: float, thickness: float, stack: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A (n, 2n), the `inverse` z-matrix (2n, n) and I − P A (2n, 2n) for one doubling of `n` slices; mm.

    stack: slices of the whole that these are a part of. Part and whole share their damping, else their results
    would differ by several HU beyond t/s 1.47.
    """
    grid = ZGrid(n, 2.0)
    A = grid_operator(grid, profile, spacing=spacing, thickness=thickness)
    lam = None
    if stack is not None:
        whole = ZGrid(min(stack, _LONG), 2.0)
        lam = damping(grid_operator(whole, profile, spacing=spacing, thickness=thickness))
    P = projection_matrix(A, lam)
    return A, inverse_matrix(interpolation_matrix("cubic", grid), A, P), projector(A, P)
