"""What is painted has the volume of its shape, wherever it lies on the grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctsr.physics.shapes import Ellipsoid, Tube, paint

SLAB, PIXEL = 2.5, 0.7  # mm
AXES = (np.arange(24) * SLAB, np.arange(80) * PIXEL, np.arange(90) * PIXEL)
MIDDLE = np.array([axis.mean() for axis in AXES])


def painted(*shapes, background=-850.0):
    return paint(shapes, AXES, slab=SLAB, edge=PIXEL, background=background)


def volume(hu, contrast, background=-850.0):
    """mm³ that `contrast` fills."""
    return float((hu.astype(np.float64) - background).sum() / contrast * SLAB * PIXEL**2)


@settings(max_examples=30)
@given(
    aside=st.tuples(*[st.floats(-1, 1)] * 3),
    radii=st.tuples(*[st.floats(3.5, 12)] * 3),
    contrast=st.floats(20, 900),
)
def test_an_ellipsoid_has_its_volume(aside, radii, contrast):
    hu = painted(Ellipsoid(MIDDLE + aside, np.array(radii), -850 + contrast))
    assert volume(hu, contrast) == pytest.approx(4 / 3 * np.pi * np.prod(radii), rel=0.03)
    assert hu.max() <= -850 + contrast + 1e-3


def test_a_tube_has_its_volume():
    half, radius = np.array([12.0, 9, 5]), 4.0
    start, end = MIDDLE - half, MIDDLE + half
    length = float(np.linalg.norm(end - start))
    hu = painted(Tube(start, end, radius, 150.0))
    assert volume(hu, 1000) == pytest.approx(np.pi * radius**2 * (length + 4 / 3 * radius), rel=0.03)


def test_later_shapes_cover_earlier_ones_by_their_opacity():
    large, small = (Ellipsoid(MIDDLE, np.full(3, r), hu) for r, hu in ((12.0, 0.0), (6.0, 100.0)))
    veil = Ellipsoid(MIDDLE, np.full(3, 3.0), 200.0, opacity=0.25)
    at = tuple(n // 2 for n in (24, 80, 90))
    assert painted(large, small)[at] == pytest.approx(100)
    assert painted(small, large)[at] == pytest.approx(0)
    assert painted(large, small, veil)[at] == pytest.approx(125)


def test_nothing_but_the_background_where_no_shape_is():
    assert (painted() == -850).all()
    assert (painted(Ellipsoid(MIDDLE + 1000, np.full(3, 5.0), 0.0)) == -850).all()
