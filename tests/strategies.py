"""Hypothesis strategies that several test files draw from."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ctsr.core.volume import Volume


def rotation(q: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of a quaternion (4,) of any length."""
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


@st.composite
def volumes(draw: st.DrawFn, max_side: int = 9, min_slices: int = 1) -> Volume:
    """A volume of any storage order, any oblique direction, thick along one axis; int16."""
    n = [draw(st.integers(1, max_side)) for _ in range(3)]
    axis, inplane, dz = draw(st.integers(0, 2)), draw(st.floats(0.25, 1.5)), draw(st.floats(2, 10))
    n[axis] = draw(st.integers(min_slices, max(max_side, min_slices)))
    spacing = [inplane] * 3
    spacing[axis] = dz
    q = np.array([draw(st.floats(-1, 1)) for _ in range(4)])
    affine = np.eye(4)
    affine[:3, :3] = rotation(q if np.linalg.norm(q) > 0.1 else np.array([1.0, 0, 0, 0])) @ np.diag(spacing)
    affine[:3, 3] = [draw(st.floats(-1000, 1000)) for _ in range(3)]
    data = np.random.default_rng(draw(st.integers(0, 2**31))).integers(-1024, 3072, n).astype(np.int16)
    return Volume(data, affine)
