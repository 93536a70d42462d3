"""The synthetic thorax: what is recorded is there, and slabs show their mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ctsr.metrics.masks import Regions
from ctsr.physics.phantom import Phantom, phantom

SHAPE, SPACING = (32, 80, 112), (2.5, 3.4, 3.4)


@pytest.fixture(scope="module")
def chest() -> Phantom:
    return phantom(0, shape=SHAPE, spacing=SPACING)


@pytest.fixture(scope="module")
def noiseless() -> Phantom:
    return phantom(0, shape=SHAPE, spacing=SPACING, noise_sd=0)


def test_the_same_seed_gives_the_same_thorax():
    shape, spacing = (4, 40, 56), (20.0, 6.8, 6.8)
    one, again, other = (phantom(seed, shape=shape, spacing=spacing).hu for seed in (0, 0, 1))
    assert one.shape == shape
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_it_is_a_body_in_air_with_two_lungs_fat_soft_tissue_and_bone(chest):
    regions = Regions.of(chest.hu)
    body = regions.body
    assert 0.4 < body.mean() < 0.75
    assert not body[:, [0, -1]].any()
    assert chest.hu[~ndimage.binary_dilation(body, iterations=3)].mean() == pytest.approx(-1000, abs=5)
    lungs, count = ndimage.label(regions.lung)
    sizes = np.sort(np.bincount(lungs.ravel())[1:])[::-1]
    assert count >= 2
    assert sizes[1] > sizes[0] / 3  # two of a kind, not one piece
    inside = chest.hu[body]
    assert 0.15 < (inside < -700).mean() < 0.6
    for low, high, least in ((-140, -60, 0.05), (20, 90, 0.1), (250, 3071, 0.005)):
        assert ((inside > low) & (inside < high)).mean() > least


def test_every_nodule_lies_where_the_record_says():
    shape, spacing = (32, 110, 150), (2.0, 1.25, 1.25)  # a small patient
    found = phantom(8, shape=shape, spacing=spacing, noise_sd=0)
    assert len(found.nodules) >= 2
    grid = np.stack(
        np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    )
    for nodule in found.nodules:
        distance = np.linalg.norm(grid - np.array(nodule.centre_mm)[:, None, None, None], axis=0)
        core = found.hu[distance < nodule.diameter_mm / 2 - 1.3]
        assert core.size
        np.testing.assert_allclose(core, nodule.hu, atol=1)  # HU
        rim = found.hu[(distance > nodule.diameter_mm / 2 + 2) & (distance < nodule.diameter_mm / 2 + 3)]
        assert np.median(rim) < -600  # lung all around


def test_a_slab_is_the_mean_of_the_thinner_slabs_in_it(noiseless):
    thin, thick = noiseless.hu, phantom(0, shape=(16, 80, 112), spacing=(5.0, 3.4, 3.4), noise_sd=0).hu
    mean = thin.reshape(16, 2, *thin.shape[1:]).mean(axis=1)
    single = thin[::2]
    assert np.abs(thick - mean).mean() < 2  # HU
    assert np.abs(thick - mean).mean() < np.abs(single - mean).mean() / 3


def test_noise_is_of_the_recorded_size_and_alike_within_a_slice(chest, noiseless):
    noise = chest.hu - noiseless.hu
    assert noise.std() == pytest.approx(chest.noise_sd, rel=0.03)
    in_plane = np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]
    along_z = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    assert in_plane > 0.2
    assert abs(along_z) < 0.05
