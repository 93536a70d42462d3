"""Any cut of the work gives the result of the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.infer.pipeline import CLASSICAL
from ctsr.infer.plan import make_plan
from ctsr.physics.operator import apply_along_z
from ctsr.physics.profile import ProfileKind, SliceProfile
from tests.infer.tiny import pipeline, thick

PLANE = (6, 5)
SAME = 0.05  # HU; float32 over cascade, null space and projection, of noise over all HU


def in_slabs(p, y, size):
    return np.concatenate([p.rows(y, a, min(p.m, a + size)) for a in range(0, p.m, size)])


@given(
    factor=st.one_of(st.integers(2, 5), st.floats(1.1, 5)),
    ratio=st.floats(0.8, 2),
    start=st.integers(0, 40),
    size=st.integers(4, 40),
    seed=st.integers(0, 99),
)
def test_a_slab_equals_its_part_of_the_whole(factor, ratio, start, size, seed):
    p = pipeline("baseline", PLANE, n=45, factor=factor, thickness=2.5 * ratio)
    y = thick(45, PLANE, seed)
    whole, stop = p.rows(y, 0, p.m), min(p.m, start + size)
    largest = np.abs(
        whole
    ).max()  # a random network on noise makes up to 10⁴ HU: float32 keeps 7 digits of them
    slab = p.rows(y, start, stop)
    np.testing.assert_allclose(slab, whole[start:stop], atol=SAME * max(1, largest / 5000))


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0])  # damped from 1.47 on
def test_slabs_equal_the_whole(ratio):
    p = pipeline("baseline", PLANE, n=90, thickness=2.5 * ratio)
    y = thick(90, PLANE)
    np.testing.assert_allclose(in_slabs(p, y, 50), p.rows(y, 0, p.m), atol=SAME)


def test_a_slab_that_the_network_adds_nothing_to_is_still_computed():
    """At a factor near 1 a thin slice may be a measured one to the last digit."""
    p = pipeline("baseline", PLANE, n=70, factor=1.1015625)
    y = thick(70, PLANE)
    np.testing.assert_allclose(in_slabs(p, y, 4)[:8], p.rows(y, 0, p.m)[:8], atol=SAME)


@pytest.mark.parametrize("method", CLASSICAL)
def test_slabs_of_a_matrix_equal_the_whole(method):
    p = pipeline(method, PLANE, n=40, factor=2.5)
    y = thick(40, PLANE)
    np.testing.assert_allclose(in_slabs(p, y, 7), p.rows(y, 0, p.m), atol=SAME)


def test_slabs_read_less_than_the_whole():
    p = pipeline("baseline", PLANE, n=200)
    first, last = p.source_range(190, 210)
    assert last - first < 50


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0, 2.5, 1.3])
@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("method", ["baseline", "inverse"])
def test_the_measured_slices_are_reproduced(method, ratio, factor):
    p = pipeline(method, PLANE, n=20, factor=factor, thickness=2.5 * ratio)
    y = thick(20, PLANE)
    x = p.rows(y, 0, p.m)
    np.testing.assert_allclose(apply_along_z(p.A, x), y, atol=0.25)


@pytest.mark.parametrize("kind", [ProfileKind.BOX, ProfileKind.TRIANGLE])
def test_the_measured_slices_are_reproduced_for_every_profile(kind):
    p = pipeline("baseline", PLANE, n=20, factor=3.0, profile=SliceProfile(kind))
    y = thick(20, PLANE)
    np.testing.assert_allclose(apply_along_z(p.A, p.rows(y, 0, p.m)), y, atol=0.25)


def test_without_consistency_the_last_projection_is_left_out():
    y = thick(20, PLANE)
    off = pipeline("baseline", PLANE, n=20, factor=3.0, is_consistent=False)
    assert np.abs(apply_along_z(off.A, off.rows(y, 0, off.m)) - y).max() > 1


def test_what_is_added_is_not_seen_by_the_measurement():
    p = pipeline("baseline", PLANE, n=20)
    y = thick(20, PLANE)
    added = p.added(y, p.rows(y, 0, p.m), 0)
    assert np.abs(added).max() > 10
    np.testing.assert_allclose(apply_along_z(p.A, added), 0, atol=0.25)


@pytest.mark.parametrize("factor", [2.0, 3.0, 2.5, 20.0])
def test_every_thick_slice_lies_in_one_slab(factor):
    p = pipeline("cubic", PLANE, n=23, factor=factor)
    ranges = [p.thick_in(a, min(p.m, a + 5)) for a in range(0, p.m, 5)]
    assert [k for a, b in ranges for k in range(a, b)] == list(range(23))


def test_a_resampled_cascade_has_the_asked_thickness():
    """An edge becomes wider with --out-thickness, and the measured slices stay."""
    y = np.zeros((20, *PLANE), np.int16)
    y[10:] = 1000
    sharp = pipeline("inverse", PLANE, n=20, thickness=2.5)
    wide = pipeline("inverse", PLANE, n=20, thickness=2.5, thin_thickness=2.0)
    steps = [np.abs(np.diff(p.rows(y, 0, p.m)[:, 0, 0])).max() for p in (sharp, wide)]
    assert steps[1] < steps[0]


def plan(p, limit, **told):
    asked = {
        "input_bytes": 1000,
        "is_padded": False,
        "itemsize": 2,
        "is_streamed": True,
        "keeps_added": False,
    }
    return make_plan(p, limit=limit, **(asked | told))


def test_the_plan_takes_what_it_may_and_no_more():
    p = pipeline("baseline", (512, 512), n=200)
    whole = plan(p, 1e12)
    assert len(whole.slabs) == 1
    less = plan(p, whole.peak_bytes - 1)
    assert len(less.slabs) > 1
    assert less.peak_bytes < whole.peak_bytes
    assert less.work > whole.work
    slabs = less.slabs
    assert slabs[0][0] == 0
    assert slabs[-1][1] == p.m
    assert all(a[1] == b[0] for a, b in pairwise(slabs))


def test_the_plan_cuts_windows_where_slabs_do_not_help():
    p = pipeline("baseline", (2048, 2048), n=20)
    small = plan(p, 2.2e9)
    assert small.tiling.patch is not None
    assert small.tiling.is_exact


def test_every_byte_that_is_kept_is_planned():
    p = pipeline("baseline", (64, 64), n=100)
    least = plan(p, 1e12).peak_bytes
    voxels = 200 * 64 * 64
    assert plan(p, 1e12, is_streamed=False).peak_bytes == least + 2 * voxels
    assert plan(p, 1e12, keeps_added=True).peak_bytes == least + 4 * voxels
    assert plan(p, 1e12, is_padded=True).peak_bytes >= least + 1000 + voxels / 2


def test_the_matrices_are_planned():
    """They are all that is large of a narrow stack: A, P, `inverse`, and the way from the finest doubling."""
    p = pipeline("baseline", (1, 1), n=400, factor=3.0)
    assert p.matrix_bytes == 8 * (3 * 400 * 1200 + 1200 * 1600)
    assert (
        plan(p, 1e12).peak_bytes - plan(pipeline("baseline", (1, 1), n=4), 1e12).peak_bytes > p.matrix_bytes
    )


def test_a_matrix_needs_no_torch_in_its_plan():
    network, matrix = (pipeline(m, (8, 8), n=10) for m in ("baseline", "cubic"))
    assert plan(network, 1e12).peak_bytes - plan(matrix, 1e12).peak_bytes > 2e8
