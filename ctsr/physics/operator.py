"""The operator A that makes thick slices from thin ones, y = A x, as a matrix along z."""

from __future__ import annotations

import numpy as np

from ctsr.core.zgrid import ZGrid
from ctsr.errors import GeometryError
from ctsr.physics.profile import SliceProfile

__all__ = ["apply_along_z", "grid_operator", "thickening_matrix"]

_SEEN = 1e-6  # a row with less than this share of its kernel inside the volume has measured nothing
_ROWS = 16  # image rows a block; 16 × 512 pixels × 266 slices are 8 MiB, which a core's cache still serves


def thickening_matrix(
    edges: np.ndarray, centres: np.ndarray, profile: SliceProfile, *, thickness: float, thin_thickness: float
) -> np.ndarray:
    """Weights A that average thin slices into thick ones, y = A x.

    edges: (m + 1,) borders of the thin slabs along z, mm, rising and evenly spaced.
    centres: (n,) positions of the thick slices, mm, same origin.
    thickness, thin_thickness: FWHM of the thick and of the thin slices' profiles, mm.

    Returns (n, m) float64 with rows that sum to one: a uniform volume keeps its HU, at the ends too, where
    part of the kernel falls outside and is not counted.
    Raises GeometryError if a thick slice lies so far out that it sees no thin slab.
    """
    slab = float(np.diff(edges).max())
    integral = profile.integral(thickness, thin_thickness, slab)
    weights = np.diff(integral(edges[None, :] - centres[:, None]), axis=1)
    seen = weights.sum(axis=1, keepdims=True)
    if (blind := np.flatnonzero(seen < _SEEN)).size:
        raise GeometryError(f"thick slice {blind[0]} at {centres[blind[0]]:g} mm lies outside the volume")
    matrix: np.ndarray = weights / seen
    return matrix


def grid_operator(
    grid: ZGrid,
    profile: SliceProfile,
    *,
    spacing: float,
    thickness: float,
    thin_thickness: float | None = None,
) -> np.ndarray:
    """A for a thin grid and its thick one, (n, m). All lengths in mm; `spacing` is that of the thick slices.

    thin_thickness: None for t' = t/F, which keeps the ratio of thickness and spacing.
    """
    thin = thickness / grid.factor if thin_thickness is None else thin_thickness
    edges, centres = grid.edges * spacing, grid.thick_centres * spacing
    return thickening_matrix(edges, centres, profile, thickness=thickness, thin_thickness=thin)


def apply_along_z(matrix: np.ndarray, volume: np.ndarray, *, add_to: np.ndarray | None = None) -> np.ndarray:
    """matrix (m, n) times volume (n, H, W) → (m, H, W) float32.

    Streams over image rows: needs one block of 16 rows beside input and output, and turns a strided or
    integer input into float32 block by block. add_to: (m, H, W) float32 that the product is added to, in
    place.
    """
    n, height, width = volume.shape
    weights = np.ascontiguousarray(matrix, dtype=np.float32)
    out = np.empty((len(weights), height, width), np.float32) if add_to is None else add_to
    for start in range(0, height, _ROWS):
        rows = slice(start, start + _ROWS)
        block = np.ascontiguousarray(volume[:, rows], dtype=np.float32)
        product = (weights @ block.reshape(n, -1)).reshape(len(weights), -1, width)
        if add_to is None:
            out[:, rows] = product
        else:
            out[:, rows] += product
    return out
