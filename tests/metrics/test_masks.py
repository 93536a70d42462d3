from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ctsr.errors import InputError
from ctsr.metrics.masks import BANDS, Regions, body_mask, smoothed
from tests.metrics.thorax import SHAPE, parts, thorax, with_noise

PARTS = parts()
NOISY = with_noise(thorax(), sd=20, seed=1)


def near(mask: np.ndarray, voxels: int) -> np.ndarray:
    """In plane, within so many voxels of the mask."""
    return ndimage.binary_dilation(mask, np.ones((1, 3, 3)), iterations=voxels)


def test_the_body_is_the_ellipse_with_its_lungs_and_without_the_table():
    body = body_mask(NOISY)
    skin = near(PARTS["body"], 2) & near(~PARTS["body"], 2)
    np.testing.assert_array_equal(body[~skin], PARTS["body"][~skin])
    assert body[PARTS["lung"]].all()
    assert not body[PARTS["table"]].any()


def test_the_lung_mask_is_the_lungs_without_the_outer_air():
    lung = Regions.of(NOISY).lung
    assert not lung[~PARTS["lung"]].any()
    assert lung[~near(~PARTS["lung"], 3)].all()


def test_a_band_holds_its_tissue_and_no_other():
    bands = Regions.of(NOISY).bands
    assert list(bands) == list(BANDS)
    for name, band in bands.items():
        deep = ~near(~PARTS[name], 5)
        assert deep.any()
        assert band[deep].all(), name
    assert not any((bands[a] & bands[b]).any() for a in bands for b in bands if a != b)
    assert not any((band & ~PARTS["body"]).any() for band in bands.values())


def errors_of_a_perfect_estimator(
    bands_of: Callable[[np.ndarray], Mapping[str, np.ndarray]],
) -> dict[str, float]:
    """Mean of pred − ref by band over ten draws of noise, HU: both are the truth plus noise of their own."""
    truth, sums = thorax(), {name: np.zeros(2) for name in BANDS}
    for draw in range(10):
        ref, pred = with_noise(truth, sd=20, seed=2 * draw), with_noise(truth, sd=20, seed=2 * draw + 1)
        for name, band in bands_of(ref).items():
            sums[name] += (pred - ref)[band].sum(dtype=np.float64), band.sum()
    return {name: total / n for name, (total, n) in sums.items()}


def test_a_perfect_noisy_estimator_shows_no_bias_in_any_band():
    for name, error in errors_of_a_perfect_estimator(lambda ref: Regions.of(ref).bands).items():
        assert abs(error) < 0.3, name  # HU; the SD of the mean is 0.13 in the small bone, 0.05 elsewhere


def test_a_band_cut_from_noisy_values_selects_its_own_noise():
    errors = errors_of_a_perfect_estimator(
        lambda ref: {name: (ref > low) & (ref <= high) & PARTS["body"] for name, (low, high) in BANDS.items()}
    )
    assert errors["fat"] > 0.4  # HU
    assert errors["soft"] < -0.6


@given(flips=st.tuples(st.booleans(), st.booleans(), st.booleans()))
@settings(max_examples=4)
def test_a_flip_of_the_patient_flips_every_mask(flips):
    turn = tuple(slice(None, None, -1 if flip else None) for flip in flips)
    straight, turned = Regions.of(NOISY), Regions.of(NOISY[turn])
    pairs = [(straight.body, turned.body), (straight.lung, turned.lung)]
    pairs += [(straight.bands[name], turned.bands[name]) for name in BANDS]
    for a, b in pairs:
        assert np.count_nonzero(a[turn] != b) <= 2  # float32 sums in another order, at a limit


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_a_stack_of_few_slices_keeps_its_slices(slices):
    regions = Regions.of(NOISY[:slices])
    assert regions.body.shape == (slices, *SHAPE[1:])
    assert regions.lung.any(axis=(1, 2)).all()
    assert all(band.any(axis=(1, 2)).all() for band in regions.bands.values())


def test_regions_of_a_given_area_stay_inside_it():
    area = np.zeros(SHAPE, bool)
    area[:, :60] = True
    regions = Regions.of(NOISY, area)
    assert regions.body is regions.scored is area
    for band in (regions.lung, *regions.bands.values()):
        assert band.any() or band is regions.bands["bone"]
        assert not band[~area].any()


def test_integers_and_floats_have_the_same_masks():
    whole = np.rint(NOISY)
    np.testing.assert_array_equal(body_mask(whole.astype(np.int16)), body_mask(whole.astype(np.float64)))


def test_padding_counts_as_air():
    padded = NOISY.copy()
    corner = ~near(PARTS["body"], 3) & ~PARTS["table"]
    padded[corner] = -32768
    air = np.where(corner, np.float32(-1000), NOISY)
    np.testing.assert_array_equal(body_mask(padded), body_mask(air))


@given(depth=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_smoothing_in_slabs_equals_smoothing_at_once(depth, seed):
    hu = np.random.default_rng(seed).normal(0, 300, (depth, 14, 9))
    expected = ndimage.gaussian_filter(hu, (1, 2, 2), truncate=3)
    np.testing.assert_allclose(smoothed(hu), expected, atol=2e-3)  # HU; float32 weights


@given(seed=st.integers(0, 999), share=st.floats(0.2, 0.9))
def test_holes_and_borders_are_those_of_scipy(seed, share):
    """Blocks of 12 × 12 voxels survive the smoothing, so the slow functions can judge the filled mask."""
    coarse = np.random.default_rng(seed).random((1, 6, 7)) < share
    hu = np.where(np.kron(coarse, np.ones((3, 12, 12), bool)), 3000.0, -1000.0)
    above = smoothed(hu) > -500
    labels, count = ndimage.label(above)
    if count == 0:
        return
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    expected = np.stack([ndimage.binary_fill_holes(each) for each in largest])
    regions = Regions.of(hu)
    np.testing.assert_array_equal(regions.body, expected)
    bone = ndimage.binary_erosion((smoothed(hu) > 200) & expected, border_value=1)
    np.testing.assert_array_equal(regions.bands["bone"], bone)


def test_air_alone_has_no_body():
    with pytest.raises(InputError, match="body mask is empty"):
        body_mask(np.full((4, 20, 20), -1000, np.int16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    hu = NOISY.copy()
    hu[17, 3, 5] = bad
    with pytest.raises(InputError, match="slice 17 has values that are not finite"):
        body_mask(hu)


def test_what_is_no_volume_is_refused():
    for shape in [(4, 4), (0, 4, 4)]:
        with pytest.raises(InputError, match="3 axes"):
            body_mask(np.zeros(shape))


@pytest.mark.ci
def test_the_masks_of_a_real_chest_are_where_a_reader_would_draw_them(reference_data):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.load(reference_data / "train" / "LIDC-IDRI-0314_1mm.nii.gz")
    hu = np.asarray(image.dataobj).transpose(2, 1, 0)
    regions = Regions.of(hu)
    assert 0.55 < regions.body.mean() < 0.62
    assert 0.11 < regions.lung.mean() < 0.15
    assert -900 < hu[regions.lung].mean() < -800
    assert not regions.body[:, -8:].any()  # the table
