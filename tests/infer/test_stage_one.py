"""One doubling by a network, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest

from ctsr.infer.windows import Tiling, within
from ctsr.models.simple_unet3d import SimpleUNet3DConfig
from tests.infer.tiny import CONFIG, engine, network, pipeline, thick

SAME = 0.05  # HU


def result(plane, n=9, **told):
    p = pipeline("baseline", plane, n=n, **told)
    return p.rows(thick(n, plane), 0, p.m)


@pytest.mark.parametrize("n", [1, 2, 3, 30])
def test_a_stack_of_any_height_streams(n):
    np.testing.assert_allclose(result((9, 8), n, chunk=1), result((9, 8), n, chunk=64), atol=SAME)


@pytest.mark.parametrize("patch", [(8, 8), (16, 24), (40, 8)])
def test_windows_that_overlap_by_the_reach_equal_the_whole(patch):
    plane = (61, 50)
    np.testing.assert_allclose(result(plane, 5, patch=patch), result(plane, 5), atol=SAME)


def test_two_tilings_agree():
    plane = (61, 50)
    one, other = result(plane, 5, patch=(16, 16)), result(plane, 5, patch=(24, 32))
    np.testing.assert_allclose(one, other, atol=SAME)


def test_the_reach_is_no_larger_than_it_must_be():
    """Windows that overlap by less than half of it differ from the whole: the law above can fail."""
    plane, reach = (61, 50), network().plane_reach
    blended = result(plane, 5, patch=(8, 8), overlap=reach // 4)
    assert np.abs(blended - result(plane, 5)).max() > SAME


def test_blended_windows_stay_near_the_whole():
    plane = (61, 50)
    whole, added = result(plane, 5), pipeline("baseline", plane, n=5)
    most = np.abs(added.added(thick(5, plane), whole, 0)).max()  # what the network does at all
    blended = result(plane, 5, patch=(16, 16), overlap=8)
    assert np.abs(blended - whole).max() < most
    assert np.percentile(np.abs(blended - whole), 50) < most / 10


@pytest.mark.parametrize("overlap", [0, 8, 22])
def test_windows_cover_the_image_once(overlap):
    tiling = Tiling(61, 50, (16, 24), overlap, 22, 4)
    seen = np.zeros((61, 50), int)
    for read, keep in tiling:
        seen[keep] += 1
        assert all(cut.start >= 0 for cut in within(keep, read))
        assert all(cut.start % 4 == 0 for cut in (*read, *keep))
    assert (seen == 1).all()
    assert tiling.pixels == sum(np.zeros((61, 50))[read].size for read, _ in tiling)


def test_progress_adds_up_to_all_slices():
    told: list[float] = []
    p = pipeline("baseline", (40, 40), n=12, factor=4.0, patch=(16, 16))
    p.rows(thick(12, (40, 40)), 0, p.m, progress=told.append)
    assert sum(told) == pytest.approx(12 + 24)  # two doublings


def test_the_working_memory_grows_with_chunk_window_and_network():
    assert engine(8).working_bytes(64, 64) > engine(2).working_bytes(64, 64) > 0
    assert engine(8).working_bytes(64, 128) == 2 * engine(8).working_bytes(64, 64)
    wide = SimpleUNet3DConfig(channels=(2 * CONFIG.channels[0], 8))
    assert engine(8, wide).working_bytes(64, 64) == 2 * engine(8).working_bytes(64, 64)


def test_large_windows_pass_in_small_steps():
    free = engine(None)
    assert [free.slices_at_once(side, side) for side in (64, 256, 512, 2048)] == [16, 8, 2, 1]
    assert engine(3).slices_at_once(64, 64) == 3
