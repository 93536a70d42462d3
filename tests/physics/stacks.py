"""Hypothesis strategies for stacks of slices and the operators between them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from ctsr.core.zgrid import ZGrid
from ctsr.physics.operator import grid_operator
from ctsr.physics.profile import SliceProfile

FACTORS = st.one_of(st.integers(2, 6).map(float), st.floats(1.1, 6))
KINDS = st.sampled_from(["gaussian", "box", "triangle"])
RATIOS = st.floats(0.6, 2.2)  # slice thickness / spacing


@st.composite
def grids(draw: st.DrawFn, min_slices: int = 1, max_slices: int = 24) -> ZGrid:
    """A thick stack and the thin one that covers it."""
    return ZGrid(draw(st.integers(min_slices, max_slices)), draw(FACTORS))


@st.composite
def operators(draw: st.DrawFn, min_slices: int = 1, ratios: st.SearchStrategy[float] = RATIOS) -> np.ndarray:
    """A (n, m) of any profile, overlap or gap."""
    spacing = draw(st.floats(1, 10))
    return grid_operator(
        draw(grids(min_slices)),
        SliceProfile(draw(KINDS)),
        spacing=spacing,
        thickness=draw(ratios) * spacing,
    )


def columns(n: int, seed: int, wide: int = 5) -> np.ndarray:
    """(n, wide) HU of anything a scan may hold."""
    return np.random.default_rng(seed).uniform(-1024, 3071, (n, wide))
